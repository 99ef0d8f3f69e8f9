"""Each stage of the search can solve a bug on its own, when only its kind of answer is right."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import BUGGY, FakeModel, Project

from lsp_agent.agent import events
from lsp_agent.agent.proof import passes

FIXED = BUGGY.replace("total == limit", "total <= limit")
TARGET = "test_calc.py::test_below"


def blank(prompt: str) -> tuple[str, str]:
    """The text of the file around the blank, without the context in front."""
    before, after = prompt.split("<FILL>")
    return before[before.rindex("# calc.py\n") + len("# calc.py\n") :], after


def only(span: str, answer: str):
    """Fill in `answer` where exactly `span` is blank, and give the original back everywhere else."""

    def infill(prompt: str) -> str:
        before, after = blank(prompt)
        lines = [line for line in before.split("\n") if "# FIXME" not in line]
        start, end = len("\n".join(lines)), len(BUGGY) - len(after)
        missing = BUGGY[start:end]
        return answer if missing == span else missing

    return infill


def test_statement_cloze(calc: Project) -> None:
    calc.model.infills = only("if total == limit:", "if total <= limit:")
    calc.model.surprising = "if total == limit:"
    result = calc.fix()
    assert (result.status, result.fixed, result.solved_by) == ("green", (TARGET,), ("cloze",))
    assert result.changes[0].after == FIXED.encode() and result.changes[0].before == BUGGY.encode()
    assert result.turns == 1, "the most surprising statement is asked for first"
    assert "+        if total <= limit:" in result.diff
    assert calc.model.closed == 1


@pytest.mark.parametrize(
    ("span", "answer"), [("total == limit", "total <= limit"), (" == ", "<=")], ids=["expression", "operator"]
)
def test_expression_cloze(calc: Project, span: str, answer: str) -> None:
    calc.model.infills = only(span, answer)
    result = calc.fix()
    assert result.status == "green" and result.solved_by == ("cloze",)
    assert b"if total <= limit:" in (result.changes[0].after or b"")


def test_group(calc: Project) -> None:
    group = BUGGY[BUGGY.index("if total") : BUGGY.index("    return False")].rstrip()
    calc.model.infills = only(group, group.replace("==", "<="))
    assert calc.fix().solved_by == ("group",)


def test_body(calc: Project) -> None:
    calc.model.infills = only(BUGGY[BUGGY.index("total = 0") :].rstrip(), FIXED[FIXED.index("total = 0") :])
    assert calc.fix().solved_by in (("body",), ("group",))


def test_insertion(project: Project) -> None:
    project.write(
        calc_py="def grow(items):\n    seen = []\n    for item in items:\n        pass\n    return seen\n",
        test_calc_py="from calc import grow\n\n\ndef test_grow():\n    assert grow([1, 2]) == [1, 2]\n",
    )

    def infill(prompt: str) -> str:
        before, after = prompt.split("<FILL>")
        gap = before.endswith("        ") and after.startswith("        pass")
        return "seen.append(item)\n" if gap else ""

    project.model.infills = infill
    result = project.fix()
    assert result.status == "green" and result.solved_by == ("insertion",)


def test_rewrite_keeps_only_what_is_needed(calc: Project) -> None:
    rewritten = FIXED.replace("total = 0", "total = 0 + 0").replace("return False", "return not True")
    calc.model.chats = lambda prompt: f"It is the comparison.\n```python\n{rewritten}```"
    result = calc.fix()
    assert result.solved_by == ("rewrite",)
    assert result.changes[0].after == FIXED.encode(), "hunks that the tests do not need are taken back"


def test_second_edit_on_what_got_further(project: Project) -> None:
    buggy = "def prime(n):\n    if n < 1:\n        return False\n    for k in range(1, n):\n        if n % k == 0:\n"
    buggy += "            return False\n    return True\n"
    project.write(
        calc_py=buggy,
        test_calc_py="from calc import prime\n\n\ndef test_prime():\n    assert prime(7)\n    assert not prime(1)\n",
    )

    def infill(prompt: str) -> str:
        before, after = prompt.split("<FILL>")
        if before.endswith("range(1, n") or after.startswith(", n):"):
            return "2"
        if "range(2, n)" in after and after.startswith("\n        return False"):
            return "if n < 2:"
        return ""

    project.model.infills = infill
    result = project.fix()
    assert result.status == "green" and result.solved_by == ("second edit",)
    assert any(isinstance(e, events.CandidateJudged) and e.verdict == "further" for e in project.events)


def test_two_bugs_one_after_the_other(project: Project) -> None:
    project.write(
        a_py="def one():\n    return 2\n",
        b_py="def two():\n    return 3\n",
        test_a_py="from a import one\n\n\ndef test_one():\n    assert one() == 1\n",
        test_b_py="from b import two\n\n\ndef test_two():\n    assert two() == 2\n",
    )
    project.model.infills = lambda p: "1" if "test_one" in p else "2" if "test_two" in p else ""
    result = project.fix()
    assert result.status == "green"
    assert set(result.fixed) == {"test_a.py::test_one", "test_b.py::test_two"} and len(result.solved_by) == 2
    assert [c.path for c in result.changes] == ["a.py", "b.py"]


def test_one_of_two_bugs_is_kept_as_the_best_attempt(project: Project) -> None:
    project.write(
        a_py="def one():\n    return 2\n",
        b_py="def two():\n    return 3\n",
        test_a_py="from a import one\n\n\ndef test_one():\n    assert one() == 1\n",
        test_b_py="from b import two\n\n\ndef test_two():\n    assert two() == 2\n",
    )
    project.model.infills = lambda p: "1" if "test_one" in p else ""
    result = project.fix(max_turns=60)
    assert result.status == "not_green" and result.changes == ()
    assert result.fixed == ("test_a.py::test_one",) and result.still_failing == ("test_b.py::test_two",)
    assert "return 1" in result.diff and result.reason


def test_only_the_asked_test_has_to_pass(project: Project) -> None:
    project.write(
        a_py="def one():\n    return 2\n\n\ndef two():\n    return 3\n",
        test_a_py="from a import one, two\n\n\ndef test_one():\n    assert one() == 1\n\n\n"
        "def test_two():\n    assert two() == 2\n",
    )
    project.model.infills = lambda p: "1" if "return <FILL>" in p and "two" in p.split("<FILL>")[1] else ""
    result = project.fix("test_a.py::test_one")
    assert result.status == "green" and result.fixed == ("test_a.py::test_one",)
    assert result.other_failing == ("test_a.py::test_two",)


def test_a_module_level_constant(project: Project) -> None:
    project.write(
        a_py="LIMIT = 5\n\n\ndef within(n):\n    return n < LIMIT\n",
        test_a_py="from a import within\n\n\ndef test_within():\n    assert within(7)\n\n\ndef test_out():\n"
        "    assert not within(12)\n",
    )
    project.model.infills = lambda p: "10" if "LIMIT = <FILL>" in p else ""
    result = project.fix()
    assert result.status == "green" and b"LIMIT = 10" in (result.changes[0].after or b"")


def test_the_model_is_told_which_test_fails_and_how(calc: Project) -> None:
    calc.model.file_tokens = ("<|repo_name|>", "<|file_sep|>")
    calc.fix(max_turns=40)
    infills = [p for p in calc.model.asked if "<FILL>" in p]
    assert all("<|file_sep|>test_calc.py\n" in p and "assert below([1, 2], 2) is True" in p for p in infills)
    assert all("test_above" not in p for p in infills), "only the failing test is shown"
    chats = [p for p in calc.model.asked if "<FILL>" not in p]
    assert chats and all("AssertionError" in p and "def below" in p for p in chats)


def test_file_and_its_line_endings_survive(calc: Project) -> None:
    crlf = BUGGY.replace("\n", "\r\n").encode("utf-8-sig")
    (calc.root / "calc.py").write_bytes(crlf)
    calc.model.infills = only("total == limit", "total <= limit")
    result = calc.fix()
    assert result.changes[0].after == crlf.replace(b"total ==", b"total <=")


def test_collection_error(project: Project) -> None:
    project.write(
        calc_py="import mathh\n\n\ndef root(x):\n    return mathh.sqrt(x)\n",
        test_calc_py="from calc import root\n\n\ndef test_root():\n    assert root(9) == 3\n",
    )
    project.model.infills = lambda p: "import math as mathh" if "<FILL>" in p and "\n<FILL>\n\n\ndef root" in p else ""
    result = project.fix()
    assert result.status == "green", result.reason
    assert b"import math as mathh" in (result.changes[0].after or b"")


def test_syntax_error(project: Project) -> None:
    project.write(
        calc_py="def double(x)\n    return 2 * x\n",
        test_calc_py="from calc import double\n\n\ndef test_double():\n    assert double(2) == 4\n",
    )
    project.model.infills = lambda p: "def double(x):" if "<FILL>\n    return" in p else ""
    result = project.fix()
    assert result.status == "green", result.reason


def test_file_that_can_be_collected_again_must_pass_as_well(project: Project) -> None:
    project.write(
        calc_py="import mathh\n\n\ndef root(x):\n    return 2\n",
        test_calc_py="from calc import root\n\n\ndef test_root():\n    assert root(9) == 3\n",
    )

    def infill(prompt: str) -> str:
        if "import mathh" not in prompt and "calc.py\n<FILL>\n\n\ndef root" in prompt:
            return "import math"
        return "math.sqrt(x)" if "import math\n" in prompt and "return <FILL>" in prompt else ""

    project.model.infills = infill
    result = project.fix()
    assert result.status == "green", result.reason
    assert b"return math.sqrt(x)" in (result.changes[0].after or b"")


def test_suspects_are_ranked_by_coverage(project: Project, tmp_path: Path) -> None:
    project.write(
        a_py="def used(x):\n    return x + 1\n\n\ndef unused(x):\n    return x\n\n\n"
        "def shared(x):\n    return used(x)\n",
        test_a_py="from a import shared, used\n\n\ndef test_bad():\n    assert shared(1) == 3\n\n\n"
        "def test_good():\n    assert used(1) == 2\n",
    )
    project.fix(max_turns=1)
    started = next(e for e in project.events if isinstance(e, events.TargetStarted))
    assert started.suspects[0] == "a.py:shared", "the passing test clears `used`"
    assert "a.py:unused" not in started.suspects


def test_fake_model_is_a_chat_model() -> None:
    from lsp_agent.chat_model import ChatModel

    model: ChatModel = FakeModel()
    assert model.tier == "small" and passes
