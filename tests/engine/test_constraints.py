"""Formats of whole answers: what random draws give under them, and what is refused."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from constraint_samples import say

from lsp_agent.chat_model import AnswerFormat, FormatKind, Sampling
from lsp_agent.engine.constraints import compile_format
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.package import Package
from lsp_agent.engine.request import Request
from lsp_agent.engine.tokens import Tokenizer
from lsp_agent.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tiny_package) -> Tokenizer:
    return Tokenizer(Package(tiny_package()))


SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "name": {"type": "string", "format": "a remark", "maxLength": 5},
        "size": {"type": "integer", "minimum": 3, "maximum": 20},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
    "$defs": {"tag": {"enum": ["a", "b", 3, "<|im_end|>"]}},
}
CLOSERS = ['"', "}", "]", '", "', "]}", "\n", ": "]


def test_text_needs_no_constraint(tokenizer) -> None:
    assert compile_format(AnswerFormat(), tokenizer) is None


def test_answers_obey_a_json_schema(tokenizer) -> None:
    made = compile_format(AnswerFormat("json_schema", json.dumps(SCHEMA)), tokenizer)
    answers = [say(made, tokenizer, seed, 250, CLOSERS) for seed in range(60)]
    values = [json.loads(answer) for answer in answers if answer is not None]
    assert len(values) > 20 and len({str(value) for value in values}) > 10
    for value in values:
        jsonschema.validate(value, SCHEMA)
    assert any("<|im_end|>" in value["tags"] for value in values)  # as text, never as the token


def test_any_json_is_an_object_with_little_whitespace(tokenizer) -> None:
    made = compile_format(AnswerFormat("json"), tokenizer)
    answers = [say(made, tokenizer, seed, 150, CLOSERS) for seed in range(40)]
    done = [answer for answer in answers if answer is not None]
    assert len(done) > 5 and all(isinstance(json.loads(answer), dict) for answer in done)
    spaces = made()
    for token in tokenizer.encode("{ "):
        spaces.accept(token)
    assert not spaces.allowed()[tokenizer.encode(" ")[0]]


def test_answers_match_a_regular_expression(tokenizer) -> None:
    pattern = r"(def|ret) [a-f]{2,4}/\d+(x|yy)?"
    made = compile_format(AnswerFormat("regex", pattern), tokenizer)
    answers = [say(made, tokenizer, seed, 60) for seed in range(30)]
    done = [answer for answer in answers if answer is not None]
    assert len(done) > 10 and all(re.fullmatch(pattern, answer) for answer in done)


def test_answers_follow_a_grammar(tokenizer) -> None:
    grammar = 'start: "(" start ")" | word\nword: /[ab]{1,3}/ %json {"const": [1]}'
    made = compile_format(AnswerFormat("lark", grammar), tokenizer)
    done = [answer for seed in range(20) if (answer := say(made, tokenizer, seed, 60)) is not None]
    assert len(done) > 5
    for answer in done:
        inner = answer.strip("()")
        assert re.fullmatch(r"[ab]{1,3}\[\s*1\s*\]", inner) and answer.count("(") == answer.count(")")


def test_what_is_forced_is_one_way_of_writing_it(tokenizer) -> None:
    made = compile_format(AnswerFormat("regex", "return (1|2) define"), tokenizer)
    constraint = made()
    beginning = constraint.forced()
    assert beginning == tokenizer.encode("return ")[: len(beginning)] and len(beginning) >= 3
    for token in beginning:
        constraint.accept(token)
    assert constraint.forced() == [] and not constraint.ended()
    with pytest.raises(ValueError, match="not allowed"):
        constraint.accept(tokenizer.encode("3")[0])
    fresh = made()
    for token in tokenizer.encode("return 1 define"):
        fresh.accept(token)
    assert fresh.ended() and set(np.flatnonzero(fresh.allowed())) == tokenizer.end_ids


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-ahead"),
        ("regex", "a" * 300_000, "longer than"),
        ("regex", "(a{1000}){1000}", "too complex"),
        ("json_schema", "{", "not valid JSON"),
        ("json_schema", "[1]", "must be a JSON object"),
        ("json_schema", "[" * 100_000, "not valid JSON"),
        ("json_schema", '{"not": {"type": "string"}}', 'Unimplemented keys: \\["not"\\]'),
        ("json_schema", '{"type": "strin"}', "Invalid type"),
        ("json_schema", '{"$ref": "#"}', "lets no answer through"),
        ("json_schema", '{"$ref": "https://example.com/schema"}', "cannot be used"),
        ("json_schema", '{"enum": []}', "Unsatisfiable"),
        ("json_schema", '{"items":' * 90 + "{}" + "}" * 90, "nested more than"),
        ("lark", "start: a", "unknown name"),
        ("lark", "", "Empty"),
        ("lark", "start: x\nx: x", "lets no answer through"),
        ("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
        ("lark", "start: <|im_start|>", "lets no answer through"),
        ("python_function", "x = 1", "must be that of one Python function"),
        ("python_function", "def f(", "must be that of one Python function"),
        ("python_function", "def f(): pass\ndef g():", "must be that of one Python function"),
        ("python_function", "def f(a=" + "(" * 3000 + "):", "must be that of one Python function"),
    ],
)
def test_what_cannot_be_enforced_is_one_sentence(tokenizer, kind: FormatKind, value: str, says: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError, match=says) as caught:
        compile_format(AnswerFormat(kind, value), tokenizer)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert time.monotonic() - started < 30


def test_a_grammar_that_becomes_too_complex_says_so(tokenizer) -> None:
    rules = [f"b{number}: /x/ a? | a a /x/?" for number in range(9)]
    grammar = "\n".join(["start: a*", f"a: {' | '.join(rule.partition(':')[0] for rule in rules)}", *rules])
    made = compile_format(AnswerFormat("lark", grammar), tokenizer)
    constraint = made()
    (letter,) = tokenizer.encode("x")
    with pytest.raises(UserError, match="too complex on the way"):
        for _ in range(1000):
            constraint.allowed()
            constraint.accept(letter)


def test_formats_are_compiled_once(tokenizer) -> None:
    values = [{"enum": [f"value {number}" for number in range(4000)]}]
    form = AnswerFormat("json_schema", json.dumps(values[0]))
    started = time.perf_counter()
    compile_format(form, tokenizer)
    first = time.perf_counter() - started
    started = time.perf_counter()
    compile_format(form, tokenizer)
    assert time.perf_counter() - started < first


def test_neither_the_command_line_nor_the_engine_load_the_library_before_it_is_needed() -> None:
    code = "import lsp_agent.cli, lsp_agent.engine.engine, sys; sys.exit('llguidance' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_engine_answers_in_the_format(tiny_engine) -> None:
    engine = tiny_engine()
    made = compile_format(AnswerFormat("json_schema", json.dumps(SCHEMA)), engine.tokenizer)
    bias = tuple((token, 3.0) for text in ('"', "}", "]") for token in engine.tokenizer.encode(text))
    done = 0
    for seed in range(12):
        sampling = Sampling(max_tokens=200, temperature=1, seed=seed, logit_bias=bias)
        request = Request(engine.tokenizer.encode("{}"), sampling, stop_ids=engine.tokenizer.end_ids, constraint=made)
        steps = list(engine.submit(request))
        text = "".join(step.text for step in steps)
        if steps[-1].finish_reason == "stop":
            jsonschema.validate(json.loads(text), SCHEMA)
            done += 1
    assert done > 3


FUNCTION = "def total(prices: list[float], *, tax: float = 0.1) -> float:"
# One a line, each of which a function may go on with, or not; `⏎` is a line break.
PYTHON = [
    line.replace("⏎", "\n")
    for line in (Path(__file__).parent / "python_phrases.txt").read_text(encoding="utf-8").splitlines()
]


def test_functions_can_be_parsed_wherever_they_may_end(tokenizer) -> None:
    made = compile_format(AnswerFormat("python_function", FUNCTION), tokenizer)
    ends = set()

    def check(text: str, may_end: bool) -> None:
        assert FUNCTION.startswith(text) or text.startswith(FUNCTION)
        if may_end and text not in ends:
            ends.add(text)
            (function,) = ast.parse(text).body
            assert isinstance(function, ast.FunctionDef) and function.name == "total"
            assert min(len(line) - len(line.lstrip()) for line in _code(function, text)) == 4

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of `1 is x` and of odd escapes
        for seed in range(40):
            say(made, tokenizer, seed, 140, PYTHON, check, ending=-9)
    assert len(ends) > 300


def test_a_function_ends_where_the_model_goes_on_at_the_margin(tokenizer) -> None:
    made = compile_format(AnswerFormat("python_function", FUNCTION), tokenizer)
    (hash_, space), fence = (tokenizer.encode(text)[0] for text in "# "), tokenizer.encode("```")[0]
    for body, ends in (("\n    return 1\n\n", True), ("\n    return (1,\n", False), ('\n    """\n', False)):
        constraint = made()
        for token in tokenizer.encode(FUNCTION + body):
            constraint.accept(token)
        if ends:
            assert constraint.allowed()[[hash_, space, fence]].all()
            assert not constraint.allowed()[sorted(tokenizer.control_ids - tokenizer.end_ids)].any()
            constraint.accept(hash_)
        else:
            assert not constraint.allowed()[sorted(tokenizer.end_ids)].any()
            constraint.accept(tokenizer.encode("#")[0])
        assert constraint.left_out() == constraint.ended() == ends


def _code(function: ast.FunctionDef, text: str) -> list[str]:
    """The lines that the body's statements begin on."""
    lines = text.split("\n")
    return [lines[statement.lineno - 1] for statement in function.body]


def _functions(path: Path) -> list[tuple[str, str]]:
    """Headers and whole texts of a file's functions, at the margin, whose body begins on a line of its own."""
    source = path.read_text(encoding="utf-8")
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = textwrap.dedent("\n".join(source.split("\n")[node.lineno - 1 : node.end_lineno])).split("\n")
            header = "\n".join(lines[: node.body[0].lineno - node.lineno]).rstrip()
            if header.endswith(":"):
                found.append((header, "\n".join(lines)))
    return found


def test_functions_of_this_package_could_have_been_written(tokenizer) -> None:
    """But for those that nest f-strings, nearly all: the grammar takes little away."""
    folder = Path(compile_format.__code__.co_filename).parents[2]
    functions = [pair for path in sorted(folder.rglob("*.py")) for pair in _functions(path)][::80]
    assert len(functions) > 15
    refused = [text for header, text in functions if not _accepted(header, text, tokenizer)]
    assert len(refused) <= 1, refused


def _accepted(header: str, text: str, tokenizer: Tokenizer) -> bool:
    constraint = compile_format(AnswerFormat("python_function", header), tokenizer)()
    for token in tokenizer.encode_text(text):
        if not constraint.allowed()[token]:
            return False
        constraint.accept(token)
    return bool(constraint.allowed()[sorted(tokenizer.end_ids)].any())


@pytest.mark.model
def test_the_real_model_writes_what_was_asked_for(small_model) -> None:
    engine = Engine.load(small_model.path)
    made = compile_format(AnswerFormat("python_function", FUNCTION), engine.tokenizer)
    prompt = engine.chat_prompt([{"role": "user", "content": "Write a function that sums prices and adds tax."}]).ids
    request = Request(prompt, Sampling(max_tokens=150), stop_ids=engine.tokenizer.end_ids, constraint=made)
    steps = list(engine.submit(request))
    text = "".join(step.text for step in steps)
    assert steps[-1].finish_reason == "stop" and text.startswith(FUNCTION)
    assert "return" in text and ast.parse(text)
