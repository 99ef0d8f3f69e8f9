"""What bench_drafting.py asks for: rewrites of the standard library's code (CPython 3.11), fresh code, and prose."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SYSTEM = "You are a careful programmer. Answer with the code only."
CONTEXT = "textwrap"
"""A module whose text stands in the prompts of fresh code and prose: something that could be copied, but is not."""
TRIPLE = "tuple[float, float, float]"


@dataclass(frozen=True)
class Task:
    """`source`: the code to rewrite, which the engine is told as `prediction`; `target`: what is answered if forced: an
    obedient rewrite, else code or documentation from the standard library that suits the request."""

    name: str
    kind: str
    request: str
    target: str
    source: str = ""


def _text(module: str) -> str:
    file = importlib.import_module(module).__file__
    assert file
    return Path(file).read_text()


def _function(module: str, name: str) -> str:
    """The source of a top-level function."""
    found = re.search(rf"^def {name}\(.*?(?=^\S)", _text(module), re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"there is no function {name} in this Python's {module}; use CPython 3.11")
    return found[0].rstrip() + "\n"


def _rewrite(name: str, source: str, change: str, edits: Sequence[tuple[str, str]]) -> Task:
    target = source
    for old, new in edits:
        if not re.search(old, target):
            raise SystemExit(f"{name} of this Python has no {old!r}; use CPython 3.11")
        target = re.sub(old, new, target)
    whole = "file" if name.endswith(".py") else "function"
    request = f"{change} Answer with the whole {whole}, unchanged elsewhere.\n\n```python\n{source}```"
    return Task(name, f"whole {whole}", request, f"```python\n{target}```", source)


def rewrites() -> list[Task]:
    """Whole functions and whole files with a small edit."""
    return [
        _rewrite(
            "textwrap.dedent",
            _function("textwrap", "dedent"),
            "Rename the variable `margin` to `common`.",
            [(r"\bmargin\b(?! =)", "common"), (r"\bmargin\b", "common")],
        ),
        _rewrite(
            "statistics.quantiles",
            _function("statistics", "quantiles"),
            "Name the length of the data `count` instead of `ld`.",
            [(r"\bld\b", "count")],
        ),
        _rewrite(
            "difflib.get_close_matches",
            _function("difflib", "get_close_matches"),
            "Return pairs of score and match instead of the matches alone.",
            [
                (r"    # Strip scores for the best n matches\n    return \[x .*\]", "    return result"),
                (r"\['apple', 'ape'\]", "[(0.8, 'apple'), (0.75, 'ape')]"),
                (r"\['while'\]", "[(0.6, 'while')]"),
                (r"\['except'\]", "[(0.6666666666666666, 'except')]"),
            ],
        ),
        _rewrite(
            "heapq.nsmallest",
            _function("heapq", "nsmallest"),
            "Raise a ValueError when `n` is negative.",
            [(r"    # Short-cut", '    if n < 0:\n        raise ValueError(f"negative: {n}")\n\n    # Short-cut')],
        ),
        _rewrite(
            "linecache.updatecache",
            _function("linecache", "updatecache"),
            "Let the caller exclude folders of sys.path by a parameter `excluded`.",
            [
                (r"module_globals=None\):", "module_globals=None, excluded=()):"),
                (r"in sys.path:\n", "in sys.path:\n            if dirname in excluded:\n                continue\n"),
            ],
        ),
        _rewrite(
            "sched.py",
            _text("sched"),
            "Add a method `clear` to the scheduler that removes all events and returns how many there were.",
            [
                (
                    r"    def empty\(self\):",
                    '    def clear(self):\n        """Remove all events and return how many there were."""\n'
                    "        with self._lock:\n            removed = len(self._queue)\n"
                    "            self._queue.clear()\n        return removed\n\n    def empty(self):",
                )
            ],
        ),
        _rewrite(
            "bisect.py",
            _text("bisect"),
            "Rename the parameter `x` to `item` in all functions.",
            [(r"\bx\b", "item")],
        ),
        _rewrite(
            "colorsys.py",
            _text("colorsys"),
            "Give the functions of the YIQ system type annotations of floats.",
            [
                (
                    rf"def {name}\({', '.join(parameters)}\):",
                    f"def {name}({': float, '.join(parameters)}: float) -> {TRIPLE}:",
                )
                for name, parameters in (("rgb_to_yiq", "rgb"), ("yiq_to_rgb", "yiq"))
            ],
        ),
    ]


def fresh() -> list[Task]:
    """Answers that copy little: code, and prose, of which there is some that could be copied in most prompts."""
    given = f"\n\n```python\n{_text(CONTEXT)[:6000]}```"
    topics = importlib.import_module("pydoc_data.topics").topics

    def code(name: str, request: str, module: str) -> Task:
        return Task(name, "fresh code", request, target=f"```python\n{_text(module)}```")

    def prose(name: str, request: str, topic: str) -> Task:
        return Task(name, "prose", request, target=topics[topic])

    return [
        code("scheduler", "Write a Python module with a general event scheduler.", "sched"),
        code("colours", f"Write a Python module like this one that converts colour systems.{given}", "colorsys"),
        code("short reprs", f"Write a Python module like this one that makes short reprs.{given}", "reprlib"),
        prose("names", "Explain in plain words how names are bound and resolved in Python.", "naming"),
        prose("imports", f"Explain in plain words what happens when this module is imported.{given}", "import"),
        prose("exceptions", f"Explain in plain words how this module should handle exceptions.{given}", "exceptions"),
    ]
