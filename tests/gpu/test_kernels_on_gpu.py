"""The kernels' tests that run in the emulator elsewhere, here with the kernels on the GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parents[1] / "engine" / "gpu"
IN_GRAPHS = TESTS / "test_prompt_kernels.py"
"""Runs the kernels inside of graphs on the CPU provider; on the GPU `test_cuda_graph.py` runs them in theirs."""
FILES = sorted({*TESTS.glob("test_*_kernels.py"), TESTS / "test_packing.py"} - {IN_GRAPHS})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_on_gpu(file: Path, cuda) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "kernels_on_gpu", "-m", "not gpu", str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(TESTS), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
