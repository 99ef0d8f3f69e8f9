"""`lsp-agent fix` with a model on somebody else's server."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import Project
from starlette.responses import JSONResponse, Response
from test_fix_safety import RIGHT

from lsp_agent.cli import app

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from model_servers import ModelServer, completed, said

SECRET = "sk-very-secret"


def answer(path: str, body: dict[str, Any]) -> Response:
    """As vLLM would: it takes the model's own prompt to fill in the middle, and scores by `echo`."""
    if body.get("echo"):
        pieces = re.findall(r"\s*\S+|\s+$", body["prompt"])
        scores = [None, *(-9.0 if piece == " ==" else -0.1 for piece in pieces[1:])]
        return JSONResponse({"choices": [{"logprobs": {"tokens": pieces, "token_logprobs": scores}}]})
    if "messages" in body:
        return said("I do not know.")
    _, prefix, suffix, middle = re.split(r"<\|fim_(?:prefix|suffix|middle)\|>", body["prompt"])
    assert not middle
    code = prefix.rpartition("# calc.py\n")[2]  # in some prompts the test stands in front as plain code
    return completed(RIGHT(f"# calc.py\n{code}<FILL>{suffix}"))


def test_the_whole_way(calc: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsp_agent.testing.pytest_runner.PytestRunner", lambda root, **_: calc.runner)
    monkeypatch.setenv("LSP_AGENT_BACKEND_KEY", SECRET)
    with ModelServer().running() as server:
        server.serve(answer)
        monkeypatch.setenv("LSP_AGENT_BACKEND__URL", server.url)
        done = CliRunner().invoke(app, ["fix", str(calc.root), "--json", "--dry-run"], standalone_mode=False)
    assert done.exception is None and done.return_value == 0, done.output
    result = json.loads(done.stdout)
    assert result["status"] == "green" and result["fixed"] == ["test_calc.py::test_below"]
    assert server.headers["authorization"] == f"Bearer {SECRET}"
    assert any("echo" in body for body in server.bodies)
    assert SECRET not in Path(result["trajectory"]).read_text() + done.output
