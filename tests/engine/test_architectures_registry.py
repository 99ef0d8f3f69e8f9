"""Adding an architecture is one file: nothing else in the engine or in the manifests knows them by name."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_gguf import Sizes, random_gguf
from test_golden_hf import PROMPT, read

from lsp_agent.engine import architectures
from lsp_agent.engine.architecture import Architecture, Block
from lsp_agent.engine.architectures import ARCHITECTURES
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.layers import Attention
from lsp_agent.engine.moe import mlp_of_block
from lsp_agent.errors import UserError
from lsp_agent.models.manifest import shipped

SMALL = Sizes(layers=2, hidden=64, head=16, intermediate=32, experts=4, used=2, expert_width=32)
HEAVY = ("numpy", "onnx", "onnxruntime", "gguf", "tokenizers")


def _block(config, index):
    return Block(Attention(qk_norm=True), mlp_of_block(config, index, shared=False))


EXAMPLE = Architecture(name="example", hf_name="example_moe", block=_block)
"""Qwen3-MoE under another name."""


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, EXAMPLE.name, EXAMPLE)


def logits(package):
    return read(Engine.load(package, threads=1, accuracy="exact"), [PROMPT])[0]


def test_each_file_is_one_architecture():
    files = {path.stem for path in Path(architectures.__file__).parent.glob("*.py")} - {"__init__", "config"}
    assert {known.hf_name for known in ARCHITECTURES.values()} == files
    assert {name.replace("_", "") for name in files} == set(ARCHITECTURES)


def test_a_new_one_imports_from_gguf(example, tmp_path):
    made = random_gguf("qwen3moe", sizes=SMALL)
    import_checkpoint(made.write(tmp_path / "known.gguf"), tmp_path / "known")
    made.named = EXAMPLE.name
    import_checkpoint(made.write(tmp_path / "example.gguf"), tmp_path / "example")
    assert Engine.load(tmp_path / "example").config.architecture == EXAMPLE.name
    assert np.array_equal(logits(tmp_path / "example"), logits(tmp_path / "known"))


def test_a_new_one_imports_from_hugging_face(example, hf_folder, hf_package, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in hf_folder("qwen3-moe").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": EXAMPLE.hf_name}))
    import_checkpoint(folder, tmp_path / "example")
    assert np.array_equal(logits(tmp_path / "example"), logits(hf_package("qwen3-moe")))


def test_a_new_one_s_manifest_is_runnable(example):
    known = next(manifest for manifest in shipped() if manifest.architecture == "qwen3moe")
    known.model_copy(update={"architecture": EXAMPLE.name}).check_runnable()
    with pytest.raises(UserError, match="does not support the example-2 architecture"):
        known.model_copy(update={"architecture": "example-2"}).check_runnable()


def test_asking_what_is_supported_loads_no_library():
    code = f"import sys, lsp_agent.models.manifest; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
