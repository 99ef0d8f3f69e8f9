"""The pure parts: spans, splicing, gates, prompts, minimising, ranking."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_agent.agent import prompts
from lsp_agent.agent.candidates import cloze, rewrite
from lsp_agent.agent.gates import Gates
from lsp_agent.agent.minimise import hunks, minimise, without_hunk
from lsp_agent.agent.naturalness import Surprise
from lsp_agent.agent.regions import MODULE, functions, module_region
from lsp_agent.agent.source import Source
from lsp_agent.agent.spans import (
    Span,
    body_span,
    expression_spans,
    gap_spans,
    group_spans,
    statement_spans,
)
from lsp_agent.chat_model import TokenScore
from lsp_agent.testing.results import Frame, TestResult

CODE = '''import math

RATE = 0.2


class Shop:
    fee = 1

    @property
    def total(self):
        """The sum."""
        for item, price in self.items:  # each: one
            if price > 0: return -price
            elif item == "é" and price < math.pi:
                self.sum += (price
                             + 1)
            else:
                pass
        try:
            return self.sum
        except (ValueError,
                KeyError) as error:
            raise error


async def top(x: int = 3) -> int:
    return x
'''
SOURCE = Source("shop.py", CODE)


def test_functions_have_qualified_names_and_decorators() -> None:
    assert [(r.name, r.start, r.end) for r in functions(SOURCE)] == [("Shop.total", 9, 23), ("top", 26, 27)]


def test_statement_spans_are_whole_statements_and_headers() -> None:
    region = functions(SOURCE)[0]
    assert [s.of(CODE) for s in statement_spans(CODE, region)] == [
        "def total(self):",
        "for item, price in self.items:",
        "if price > 0:",
        "return -price",
        'elif item == "é" and price < math.pi:',
        "self.sum += (price\n                             + 1)",
        "pass",
        "return self.sum",
        "raise error",
    ]


def test_module_spans_leave_functions_out() -> None:
    texts = [s.of(CODE) for s in statement_spans(CODE, module_region(SOURCE))]
    assert texts == ["import math", "RATE = 0.2", "fee = 1"]


def test_expressions_and_operators() -> None:
    texts = {(s.kind, s.of(CODE)) for s in expression_spans(CODE, functions(SOURCE)[0])}
    assert {("expression", 'item == "é" and price < math.pi'), ("operator", " and "), ("operator", " < ")} <= texts
    assert ("expression", "self.sum") in texts and ("expression", "item") in texts
    assert ("expression", "error") in texts


def test_gaps_lie_between_lines() -> None:
    for span in gap_spans(CODE, functions(SOURCE)[0]):
        assert span.start == span.end and (span.start == 0 or CODE[span.start - 1] == "\n")


@pytest.mark.parametrize("spans", [statement_spans, expression_spans, group_spans])
def test_putting_the_original_back_changes_nothing(spans) -> None:
    for region in [*functions(SOURCE), module_region(SOURCE)]:
        for span in spans(CODE, region):
            answer = cloze.splice(CODE, span, span.of(CODE))
            assert answer is not None and ast.dump(ast.parse(answer)) == ast.dump(ast.parse(CODE)), span


def test_body_leaves_the_docstring() -> None:
    body = body_span(CODE, functions(SOURCE)[0])
    assert body is not None and body.of(CODE).startswith("for item") and body.of(CODE).endswith("raise error")
    assert body_span(CODE, module_region(SOURCE)) is None


def test_a_file_that_does_not_parse_has_line_spans() -> None:
    text = "def f(x)\n    return x\n"
    spans = statement_spans(text, module_region(Source("a.py", text)))
    assert [s.of(text) for s in spans] == ["def f(x)", "return x"]


def span_of(code: str, part: str, kind: str = "statement") -> Span:
    start = code.index(part)
    line_start = code.rfind("\n", 0, start) + 1
    indent = code[line_start : start - len(code[line_start:start].lstrip())]
    return Span(kind, start, start + len(part), code.count("\n", 0, start) + 1, indent)  # type: ignore[arg-type]


def test_an_answer_is_cut_back_to_what_parses() -> None:
    code = "def f(x):\n    y = x\n    return y\n"
    assert cloze.splice(code, span_of(code, "y = x"), "y = x + 1\n    if") == "def f(x):\n    y = x + 1\n    return y\n"
    header = "def f(x):\n    if x:\n        return 1\n"
    assert cloze.splice(header, span_of(header, "if x:", "header"), "if not x:\n        return 2\n") == header.replace(
        "if x", "if not x"
    )


def test_an_empty_answer_deletes_a_statement_but_not_a_block() -> None:
    code = "def f(x):\n    y = x\n    return y\n"
    assert cloze.splice(code, span_of(code, "y = x"), "") == "def f(x):\n    return y\n"
    alone = "def f(x):\n    y = x\n"
    assert cloze.splice(alone, span_of(alone, "y = x"), " \n") == "def f(x):\n    pass\n"
    assert cloze.splice(code, span_of(code, "def f(x):", "header"), "") is None


def test_stops_and_budgets_keep_answers_short() -> None:
    view = prompts.view(SOURCE, functions(SOURCE)[1])
    span = span_of(CODE, "return x\n"[:-1])
    ask = cloze.ask("cloze", view, span, None, None)
    assert ask.sampling.stop == ("\n",) and ask.sampling.max_tokens < 40
    assert ask.prefix.endswith("-> int:\n    ") and ask.suffix == "\n"


def test_rewrite_is_spliced_by_name_with_docstring_indent_and_imports() -> None:
    view = prompts.view(SOURCE, functions(SOURCE)[0])
    answer = (
        "The bug is in `x = 1`:\n```python\nx = 1\n```\nFixed:\n```python\nimport os\n\nclass Shop:\n    @property\n"
        "    def total(self):\n        return os.getpid()\n```\nDone."
    )
    text = rewrite.splice_function(view, answer)
    assert text is not None
    assert 'def total(self):\n        """The sum."""\n        return os.getpid()\n\n\nasync def top' in text
    assert text.startswith("import math\nimport os\n") and text.count("@property") == 1
    assert rewrite.splice_function(view, "I cannot help.") is None
    assert rewrite.splice_function(view, "```python\ndef other():\n    pass\n```") is None


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ("def f(x):\n    return (x\n", "does not parse"),
        ("def f(x):\n    return y\n", "undefined name 'y'"),
        ("def f(x):\n    return x  # same\n", "no change"),
        ("return 1\n", "does not parse"),
        ("def f(x):\n    yield x\n", None),
    ],
)
def test_gates(after: str, reason: str | None) -> None:
    refused = Gates().refuse("a.py", "def f(x):\n    return x\n", {"a.py": after})
    assert refused is None if reason is None else reason in (refused or "")


def test_gates_forgive_what_was_wrong_before_and_refuse_the_second_time() -> None:
    gates = Gates()
    before = "def f(x):\n    return missing + x\n"
    assert gates.refuse("a.py", before, {"a.py": "def f(x):\n    return missing - x\n"}) is None
    assert gates.refuse("a.py", before, {"a.py": "def f(x):\n  return (missing - x)\n"}) == "tried before"
    other = {"a.py": "def f(x):\n    return missing - x\n", "b.py": "x = 1\n"}
    assert gates.refuse("a.py", before, other) is None, "another state of the other files is another candidate"


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_taking_back_every_hunk_gives_the_original(old: list[str], new: list[str]) -> None:
    before, after = "\n".join(old), "\n".join(new)
    for index in range(hunks(before, after) - 1, -1, -1):
        assert hunks(before, without_hunk(before, after, index)) <= hunks(before, after)
    assert minimise(before, after, lambda text: True) == after or hunks(before, after) > 1


def test_minimise_keeps_what_is_needed() -> None:
    before = "\n".join("abcdefgh")
    after = "\n".join("AbCdEfGh")
    assert minimise(before, after, lambda text: "E" in text) == before.replace("e", "E")


def test_surprise_sums_over_the_tokens_of_a_span() -> None:
    scores = [TokenScore(10, 12, -1.0), TokenScore(12, 15, -2.0), TokenScore(15, 20, -4.0)]
    surprise = Surprise.of(scores, 10)
    assert surprise.total(Span("statement", 0, 2, 1)) == 1.0
    assert surprise.total(Span("statement", 1, 5, 1)) == 3.0
    assert surprise.mean(Span("statement", 0, 10, 1)) == pytest.approx(7 / 3)
    assert surprise.mean(Span("gap", 20, 20, 1)) == 0.0


def test_problem_shows_the_test_around_its_failing_line() -> None:
    lines = [f"    assert f({i}) == {i}" for i in range(100)]
    test = "import pytest\nfrom a import f\n\n\ndef test_f():\n" + "\n".join(lines) + "\n"
    result = TestResult(
        "test_a.py::test_f", "failed", 0, "test_a.py", 5, "AssertionError", "assert 51 == 50",
        (Frame("test_a.py", 56, "test_f"), Frame("a.py", 2, "f")),
    )  # fmt: skip
    about = prompts.problem(result, test)
    assert "f(50) == 50" in about.test and "f(99)" not in about.test and prompts.CUT in about.test
    assert len(about.test.split("\n")) <= prompts.TEST_LINES + 6
    assert about.test.startswith("from a import f") and "import pytest" not in about.test
    assert about.failure == "AssertionError: assert 51 == 50"


def test_view_of_a_long_file_is_short_and_has_what_the_function_uses() -> None:
    filler = "\n\n".join(f"def filler{i}():\n    return {i}" for i in range(60))
    code = (
        'import math\n\nLIMIT = 3\nOTHER = 4\n\n\ndef helper(x):\n    """Help."""\n    return x\n\n\n'
        f"{filler}\n\n\nclass Shop:\n    tax = 1\n\n    def __init__(self):\n        self.a = 1\n\n"
        "    def price(self, x):\n        return helper(x) + LIMIT + math.pi\n"
    )
    source = Source("a.py", code)
    view = prompts.view(source, next(r for r in functions(source) if r.name == "Shop.price"))
    assert "import math" in view.head and "LIMIT = 3" in view.head and 'def helper(x):\n    """Help."""' in view.head
    assert "OTHER" not in view.head and "filler3" not in view.head
    assert "self.a = 1" in view.head and view.head.rstrip().endswith("self.a = 1")
    assert len(view.head) < 400


def test_a_long_module_is_windowed() -> None:
    code = "\n".join(f"value_{i} = {i}" for i in range(2000)) + "\n"
    source = Source("a.py", code)
    view = prompts.view(source, module_region(source))
    at = code.index("value_1000 ")
    assert len(view.prefix(at)) < 6000 and len(view.suffix(at)) < 3000
    assert view.prefix(at).endswith("value_999 = 999\n") and prompts.CUT in view.prefix(at)
    assert view.region.name == MODULE


@pytest.mark.parametrize(
    "content",
    [
        b"a = 1\r\nb = 2\r\n",
        b"\xef\xbb\xbfa = 1\n",
        b"# -*- coding: latin-1 -*-\nx = '\xe9'\n",
        b"a = 1\r\nb = 2\n",
        b"",
    ],
)
def test_source_survives_the_round_trip(content: bytes) -> None:
    source = Source.decode("a.py", content)
    assert source is not None and source.encode(source.text) == content


def test_source_says_what_it_cannot_hold() -> None:
    assert Source.decode("a.py", b"x = '\xe9'\n") is None
    latin = Source.decode("a.py", b"# -*- coding: latin-1 -*-\n")
    assert latin is not None and latin.encode("x = '\N{SNOWMAN}'") is None
