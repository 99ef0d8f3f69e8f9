"""What constrained decoding costs: milliseconds to compile a format, microseconds a token for its masks.

    python benchmarks/bench_constraints.py PACKAGE [--rounds 20]

`PACKAGE` is an imported model's folder; only its vocabulary is read. Each format is compiled anew in every round, then
an answer that it lets through is walked along twice: the first finds the states of the lexer, the second, as any later
one, finds them made. `mask` is `Constraint.allowed`, `accept` both noting a token and asking what is forced after it.
Figures are medians of the rounds, in CPU time of the thread, which is what an engine's other answers wait for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lsp_agent.chat_model import AnswerFormat, Sampling, ToolSchema
from lsp_agent.engine.constraints import Constraint, compile_format, constraint_for_tools, grammar
from lsp_agent.engine.package import Package
from lsp_agent.engine.sampling import HostLogits, Sampler
from lsp_agent.engine.tokens import Tokenizer

EDIT = ToolSchema(
    "edit_file",
    "Replace lines of a file",
    {
        "type": "object",
        "properties": {
            "path": {"type": "string"},
            "edits": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "first_line": {"type": "integer", "minimum": 1},
                        "last_line": {"type": "integer", "minimum": 1},
                        "text": {"type": "string"},
                    },
                    "required": ["first_line", "last_line", "text"],
                    "additionalProperties": False,
                },
            },
            "mode": {"enum": ["replace", "insert"]},
        },
        "required": ["path", "edits"],
        "additionalProperties": False,
    },
    strict=True,
)
CALL = {
    "path": "src/orders/totals.py",
    "edits": [
        {"first_line": 12, "last_line": 14, "text": "    total = sum(item.price for item in items)\n    return total\n"}
    ],
    "mode": "replace",
}
LARGE = {
    "type": "object",
    "properties": {
        f"section_{number}": {
            "type": "object",
            "properties": {f"field_{i}": {"enum": [f"choice {i} {j}" for j in range(20)]} for i in range(10)},
            "required": [f"field_{i}" for i in range(10)],
            "additionalProperties": False,
        }
        for number in range(40)
    },
    "required": [f"section_{number}" for number in range(40)],
    "additionalProperties": False,
}
LARGE_ANSWER = {
    f"section_{number}": {f"field_{i}": f"choice {i} {(number + i) % 20}" for i in range(10)} for number in range(40)
}
PATTERN = r"(feat|fix|docs|refactor)(\([a-z-]{1,20}\))?: [A-Za-z0-9 ,.'-]{5,72}"
HEADER = "def parse_ranges(text: str, *, limit: int = 100) -> list[tuple[int, int]]:"
FUNCTION = f'''{HEADER}
    """Read ranges such as `1-3, 7`; raises ValueError for anything else."""
    found: list[tuple[int, int]] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        try:
            start, end = int(first), int(last if dash else first)
        except ValueError as error:
            raise ValueError(f"not a range: {{piece!r}}") from error
        if start > end or len(found) >= limit:  # nothing sensible
            raise ValueError("too many ranges" if start <= end else f"{{start}} > {{end}}")
        found.append((start, end))
    return sorted(found, key=lambda pair: (pair[0], -pair[1]))
'''


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    tokenizer = Tokenizer(Package(arguments.package))
    started = time.thread_time()
    vocabulary = grammar._vocabulary(tokenizer)
    print(f"{tokenizer.vocabulary} tokens, read once in {time.thread_time() - started:.2f} s\n")
    print("| format | compile, ms | tokens | forced | mask, µs: first answer | later (99 %) | accept, µs |")
    print("|---|---|---|---|---|---|---|")

    def call(call_format: str) -> Callable[[], Callable[[], Constraint] | None]:
        return lambda: constraint_for_tools([EDIT], "required", call_format, tokenizer, False)  # type: ignore[arg-type]

    def form(kind: str, value: str) -> Callable[[], Callable[[], Constraint] | None]:
        return lambda: compile_format(AnswerFormat(kind, value), tokenizer)  # type: ignore[arg-type]

    parameters = json.dumps(EDIT.parameters)
    xml = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in CALL.items()
    )
    large = json.dumps(LARGE)
    arguments_json = json.dumps(CALL)
    hermes = f'<tool_call>\n{{"name": "edit_file", "arguments": {arguments_json}}}\n</tool_call>'
    coder = f"<tool_call>\n<function=edit_file>\n{xml}</function>\n</tool_call>"
    for name, compiled, answer in (
        ("JSON schema of a tool", form("json_schema", parameters), arguments_json),
        ("its call, Hermes", call("hermes"), hermes),
        ("its call, Qwen3-Coder", call("qwen3_coder"), coder),
        (f"JSON schema of {len(large) // 1000} kB", form("json_schema", large), json.dumps(LARGE_ANSWER)),
        ("regular expression", form("regex", PATTERN), "fix(engine): Read no prompt twice, not even a cancelled one"),
        ("Python function", form("python_function", HEADER), FUNCTION),
    ):
        print(row(name, compiled, tokenizer.encode(answer), vocabulary, arguments.rounds), flush=True)
    print(f"\n{draws(tokenizer.vocabulary, arguments.rounds)}")


def row(
    name: str,
    compiled: Callable[[], Callable[[], Constraint] | None],
    tokens: list[int],
    vocabulary: grammar.Vocabulary,
    rounds: int,
) -> str:
    """A line of the table."""
    compiling, first, later, worst, accepting = [], [], [], [], []
    forced = 0
    for _ in range(rounds):
        vocabulary._grammars.clear()
        started = time.thread_time()
        make = compiled()
        compiling.append(time.thread_time() - started)
        assert make is not None
        masks, _, _ = walk(make(), tokens)
        first.append(statistics.mean(masks))
        masks, accepts, forced = walk(make(), tokens)
        later.append(statistics.mean(masks))
        worst.append(float(np.quantile(masks, 0.99)))
        accepting.append(statistics.mean(accepts))
    middle = [statistics.median(values) * 1e6 for values in (first, later, worst, accepting)]
    milliseconds = statistics.median(compiling) * 1e3
    return (
        f"| {name} | {milliseconds:.1f} | {len(tokens)} | {forced} "
        f"| {middle[0]:.0f} | {middle[1]:.0f} ({middle[2]:.0f}) | {middle[3]:.0f} |"
    )


def walk(constraint: Constraint, tokens: list[int]) -> tuple[list[float], list[float], int]:
    """Seconds of each mask, of each accept, and how many tokens were forced."""
    masks, accepts, forced, known = [], [], 0, 0
    for place, token in enumerate(tokens):
        started = time.thread_time()
        allowed = constraint.allowed()
        masks.append(time.thread_time() - started)
        assert allowed[token], (place, token)
        started = time.thread_time()
        constraint.accept(token)
        following = constraint.forced()
        accepts.append(time.thread_time() - started)
        forced += place < known
        known = max(known, place + 1 + len(following))
    return masks, accepts, forced


def draws(vocabulary: int, rounds: int) -> str:
    """What a greedy draw takes, plain, and where the best tokens are not allowed."""
    random = np.random.default_rng(1)
    logits = random.normal(0, 3, vocabulary).astype(np.float32)
    order = np.argsort(-logits)
    named: dict[str, np.ndarray | None] = {"plain": None}
    for name, place in (("the best allowed", 0), ("from the 40th on", 39), ("from the 1000th on", 999)):
        mask = np.zeros(vocabulary, np.bool_)
        mask[order[place:]] = True
        named[name] = mask
    found = []
    for name, allowed in named.items():
        seconds = []
        for _ in range(rounds * 5):
            sampler = Sampler(Sampling())
            started = time.thread_time()
            sampler.draw(HostLogits(logits), (), allowed)
            seconds.append(time.thread_time() - started)
        found.append(f"{name} {statistics.median(seconds) * 1e6:.0f}")
    return f"A greedy draw, µs: {', '.join(found)}"


if __name__ == "__main__":
    main()
