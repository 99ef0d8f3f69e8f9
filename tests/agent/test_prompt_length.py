"""A prompt that does not fit the model's context costs that one ask, never the run."""

from __future__ import annotations

import json

import pytest
from conftest import BUGGY, Project
from test_fix_safety import RIGHT

from lsp_agent.agent.prompts import CUT, fitting
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import TokenScore
from lsp_agent.errors import PromptTooLong, UserError

TOO_LONG = PromptTooLong("The prompt has 9000 tokens and the context holds 8192; shorten the prompt.")


def test_asks_that_are_too_long_are_skipped(calc: Project) -> None:
    """Of the first asks none is answered, and no region can be scored; a later ask still solves the bug."""

    def answer(prompt: str) -> str:
        if len(calc.model.asked) <= 3:
            raise TOO_LONG
        return RIGHT(prompt)

    def score(text: str, cancel: CancelToken) -> list[TokenScore]:
        raise TOO_LONG

    calc.model.infills, calc.model.score = answer, score  # type: ignore[method-assign]
    result = calc.fix()
    assert result.status == "green" and result.turns > 3
    assert result.trajectory is not None
    asks = [r for r in map(json.loads, result.trajectory.read_text().splitlines()) if r["kind"] == "ask"]
    assert [a["answers"] for a in asks[:3]] == [[]] * 3 and all("shorten" in a["problem"] for a in asks[:3])
    assert "problem" not in asks[3]


def test_best_attempt_survives_asks_that_are_too_long(project: Project) -> None:
    project.write(
        a_py="def one():\n    return 2\n",
        b_py="def two():\n    return 3\n",
        test_a_py="from a import one\n\n\ndef test_one():\n    assert one() == 1\n",
        test_b_py="from b import two\n\n\ndef test_two():\n    assert two() == 2\n",
    )

    def answer(prompt: str) -> str:
        if "test_two" in prompt:
            raise TOO_LONG
        return "1"

    project.model.infills = project.model.chats = answer
    result = project.fix(max_turns=40)
    assert result.status == "not_green" and result.fixed == ("test_a.py::test_one",) and "return 1" in result.diff


def test_other_errors_of_the_model_end_the_run(calc: Project) -> None:
    def answer(prompt: str) -> str:
        raise UserError("The engine stopped while it answered; run again.")

    calc.model.infills = answer
    with pytest.raises(UserError, match="engine stopped"):
        calc.fix()


def test_prompts_are_cut_to_the_context(calc: Project) -> None:
    long = "".join(f"NAME_{i} = {i}\n" for i in range(2000))
    calc.write(calc_py=long + BUGGY, test_calc_py=(calc.root / "test_calc.py").read_text())
    calc.model.context_length = 400
    calc.fix(max_turns=10)
    infills = [p for p in calc.model.asked if "<FILL>" in p]
    assert infills and all(len(p) < 400 * 2.5 + 100 for p in infills)


def test_what_is_nearest_to_the_blank_stays() -> None:
    prefix, suffix = "".join(f"b{i}\n" for i in range(100)) + "    x = ", "\n" + "".join(f"a{i}\n" for i in range(100))
    assert fitting(prefix, suffix, 10_000) == (prefix, suffix)
    cut_prefix, cut_suffix = fitting(prefix, suffix, 150)
    assert cut_prefix.startswith(f"{CUT}\n") and cut_prefix.endswith("b98\nb99\n    x = ")
    assert cut_suffix.startswith("\na0\na1\n") and cut_suffix.endswith(f"{CUT}\n")
    assert len(cut_prefix) + len(cut_suffix) <= 150 + 2 * len(f"{CUT}\n")
