"""An engine process whose GPU is lost says so and ends; the client starts another, which answers."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.gpu.errors import GpuLost
from lsp_agent.engine.service.client import EngineModel

# The engine process, with an engine that fails as often as a file says and scores texts otherwise.
BOOTSTRAP = """
    import sys
    from pathlib import Path
    from types import SimpleNamespace

    from lsp_agent.chat_model import TokenScore
    from lsp_agent.engine import engine
    from lsp_agent.engine.service import process

    left = Path(__file__).with_name("failures")

    class Fake:
        context_length = 100

        def score_text(self, text, cancel):
            failures = int(left.read_text())
            if failures:
                left.write_text(str(failures - 1))
                raise RuntimeError("CUDA failure 719: unspecified launch failure ; GPU=0 ; expr=cudaStreamSynchronize")
            return [TokenScore(0, len(text), -1.0)]

        def remember(self):
            raise OSError("no room")  # which ends nothing

    engine.Engine.load = lambda *_, **__: Fake()
    started = Path(__file__).with_name("started")
    started.write_text(started.read_text() + "x" if started.exists() else "x")
    sys.argv[1:] = sys.argv[4:]  # after -P -m MODULE
    process.main()
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`model(failures)`: a client of the process above."""
    (tmp_path / "bootstrap.py").write_text(textwrap.dedent(BOOTSTRAP))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "bootstrap.py"} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("LSP_AGENT_STATE_DIR", str(tmp_path / "state"))
    opened = []

    def start(failures: int) -> EngineModel:
        (tmp_path / "failures").write_text(str(failures))
        opened.append(EngineModel("fake", tmp_path, tier="small", context_length=100))
        return opened[0]

    yield start
    opened[0].close()


def test_the_question_is_asked_again_of_a_new_process(model, tmp_path):
    client = model(failures=1)
    first = client.process.pid
    assert [score.logprob for score in client.score("x = 1", CancelToken())] == [-1.0]
    assert client.process.pid != first and (tmp_path / "started").read_text() == "xx"


def test_a_gpu_that_is_lost_each_time_is_one_sentence_and_the_next_question_starts_anew(model, tmp_path):
    client = model(failures=2)
    with pytest.raises(GpuLost, match=r"stopped working in mid-run \(CUDA failure 719: unspecified launch failure\)"):
        client.score("x = 1", CancelToken())
    assert client.process.ended(within_s=10)
    assert [score.logprob for score in client.score("x = 1", CancelToken())] == [-1.0]
    assert (tmp_path / "started").read_text() == "xxx"
