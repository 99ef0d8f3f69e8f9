"""An engine process whose GPU is lost says so and ends; the client starts another, which answers."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.gpu.errors import GpuLost
from lsp_agent.engine.service import launch
from lsp_agent.engine.service.client import EngineModel

# The engine process; its runs fail as often as a file says.
BOOTSTRAP = """
    import sys
    from pathlib import Path

    from lsp_agent.engine import session
    from lsp_agent.engine.service import process

    left = Path(__file__).with_name("failures")
    run = session.Decoder.run

    def failing(self, *arguments):
        failures = int(left.read_text())
        if failures:
            left.write_text(str(failures - 1))
            raise RuntimeError("CUDA failure 719: unspecified launch failure ; GPU=0 ; expr=cudaStreamSynchronize")
        return run(self, *arguments)

    def remember(self):
        raise OSError("no room")  # which ends nothing

    session.Decoder.run, session.Decoder.remember = failing, remember
    started = Path(__file__).with_name("started")
    started.write_text(started.read_text() + "x" if started.exists() else "x")
    sys.argv[1:] = sys.argv[4:]  # after -P -m MODULE
    process.main()
"""


@pytest.fixture
def model(tmp_path: Path, tiny_package, monkeypatch: pytest.MonkeyPatch):
    """`model(failures)`: a client of the process above."""
    (tmp_path / "bootstrap.py").write_text(textwrap.dedent(BOOTSTRAP))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "bootstrap.py"} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    opened = []

    def start(failures: int) -> EngineModel:
        (tmp_path / "failures").write_text(str(failures))
        opened.append(EngineModel("fake", tiny_package(), tier="small"))
        return opened[0]

    yield start
    opened[0].close()


def ask(client: EngineModel) -> int:
    [answer] = client.infill("x = 1\n", "\n", Sampling(max_tokens=3), CancelToken())
    return answer.usage.completion_tokens


def test_the_question_is_asked_again_of_a_new_process(model, tmp_path):
    client = model(failures=1)
    first = client.endpoint.about.pid
    assert ask(client) == 3
    assert client.endpoint.about.pid != first and (tmp_path / "started").read_text() == "xx"


def test_a_gpu_that_is_lost_each_time_is_one_sentence_and_the_next_question_starts_anew(model, tmp_path):
    client = model(failures=2)
    with pytest.raises(GpuLost, match=r"stopped working in mid-run \(CUDA failure 719: unspecified launch failure\)"):
        ask(client)
    last = client.endpoint.about
    assert launch.wait_until(lambda: launch.gone(last), 10)
    assert ask(client) == 3
    assert (tmp_path / "started").read_text() == "xxx"
