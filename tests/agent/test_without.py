"""A model whose server cannot score texts or fill in the middle: the run does without."""

from __future__ import annotations

import json

from conftest import BUGGY, Project
from test_fix_safety import RIGHT

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import TokenScore
from lsp_agent.errors import Unsupported

NO_SCORES = "The model server does not tell how likely the tokens of a text are."
NO_INFILL = "The model server does not fill in the middle."


def no_scores(text: str, cancel: CancelToken) -> list[TokenScore]:
    asked.append(text)
    raise Unsupported(NO_SCORES)


asked: list[str] = []


def no_infill(prompt: str) -> str:
    raise Unsupported(NO_INFILL)


def test_a_bug_is_fixed_without_scores_which_are_asked_for_once(calc: Project) -> None:
    asked.clear()
    calc.model.infills, calc.model.score = RIGHT, no_scores  # type: ignore[method-assign]
    assert calc.fix().status == "green"
    assert len(asked) == 1


def test_without_infill_the_function_is_rewritten_in_a_chat(calc: Project) -> None:
    calc.model.infills = no_infill
    calc.model.chats = lambda prompt: f"```python\n{BUGGY.replace('==', '<=')}```"
    result = calc.fix()
    assert result.status == "green" and result.solved_by == ("rewrite",)
    assert result.trajectory is not None
    asks = [r for r in map(json.loads, result.trajectory.read_text().splitlines()) if r["kind"] == "ask"]
    assert [a["stage"] for a in asks if a.get("problem") == NO_INFILL] == ["cloze"], "one turn finds it out"


def test_what_was_done_without_is_said_when_nothing_is_found(calc: Project) -> None:
    calc.model.infills, calc.model.score = no_infill, no_scores  # type: ignore[method-assign]
    result = calc.fix(max_turns=12)
    assert result.status == "not_green"
    assert NO_SCORES in result.reason and NO_INFILL in result.reason
