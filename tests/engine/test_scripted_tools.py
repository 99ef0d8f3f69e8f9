"""The scripted model is asked with tools as a real one is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tool_calls_samples import TOOLS, WRITERS

from lsp_agent.borrowed import Borrowed
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Problem, Sampling
from lsp_agent.engine.scripted import ScriptedModel


@pytest.mark.parametrize("call_format", WRITERS)
def test_its_answers_hold_calls_where_tools_are_offered(tmp_path: Path, call_format) -> None:
    call = WRITERS[call_format]("read_file", {"path": "a.py", "start": 3})
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"tool_calls": call_format, "rules": [{"answers": [f"I look.\n{call}", call[:-30]]}]}))
    model = Borrowed(ScriptedModel(script))
    question = [{"role": "user", "content": "go"}]
    [first] = model.chat(question, Sampling(), CancelToken(), tools=TOOLS)
    assert [(c.name, c.arguments, c.raw) for c in first.tool_calls] == [
        ("read_file", {"path": "a.py", "start": 3}, call)
    ]
    assert (first.text, first.finish_reason) == ("I look.\n", "tool_calls")
    [second] = model.chat(question, Sampling(), CancelToken(), tools=TOOLS)
    assert second.text == call[:-30] and not second.tool_calls
    assert [problem.problem for problem in second.problems] == [Problem.CUT_OFF]
    [third] = model.chat(question, Sampling(), CancelToken())
    assert third.text == call[:-30] and not third.problems
