"""Which functions may hold the bug, without asking the model: traceback frames, coverage by Ochiai, names in the test.

Ochiai (Abreu et al. 2006): of a line, failing tests that run it / sqrt(all failing · tests that run it). Only the test
at hand counts as failing: other failures may have other causes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lsp_agent.agent.regions import MODULE, Region, functions, module_region, parse
from lsp_agent.agent.source import Source
from lsp_agent.testing.results import TestResult, TestRun

LAST_FRAME = 1.0
OTHER_FRAME = 0.5
NAMED_IN_TEST = 0.3
MODULE_CODE = 0.15
"""Module-level code runs at import, outside any test, so coverage says nothing of it."""
NOT_COVERED = 0.05
MOST_SUSPECTS = 8


@dataclass(frozen=True)
class Suspect:
    """A region and how suspicious it is; `score` is relative to the most suspicious one (1.0)."""

    region: Region
    score: float
    executed: frozenset[int] = frozenset()
    """Lines the failing test ran; empty when that is not known."""
    framed: frozenset[int] = frozenset()
    """Lines that the failure's traceback names."""


def localise(
    result: TestResult,
    run: TestRun,
    read: Callable[[str], Source | None],
    paths: Sequence[str],
    is_protected: Callable[[str], bool],
    test_source: str,
) -> list[Suspect]:
    """Rank the regions that a fix of `result` may edit, at most `MOST_SUSPECTS`.

    `run` has coverage where the runner could give it; `paths` are the workspace's files; `read` gives their text.
    """
    frames = [f for f in result.frames if f.path.endswith(".py") and not is_protected(f.path)]
    covered = {
        path: lines
        for path, lines in run.coverage.get(result.nodeid, {}).items()
        if path.endswith(".py") and not is_protected(path)
    }
    names = set(re.findall(r"[A-Za-z_]\w*", test_source))
    candidates = {*(f.path for f in frames), *covered}
    if not covered:
        # No coverage (a crash, a collection error): files whose module the test file names.
        candidates |= {p for p in paths if _module_named(p, names) and p.endswith(".py") and not is_protected(p)}
    passing = [c for n, c in run.coverage.items() if n in run.results and not run.results[n].bad]
    suspects: list[Suspect] = []
    for path in sorted(candidates):
        source = read(path)
        if source is None:
            continue
        framed = frozenset(f.line for f in frames if f.path == path)
        deepest = frames[-1].line if frames and frames[-1].path == path else 0
        lines = covered.get(path, frozenset())
        score_of = _ochiai(path, lines, passing)
        for region in [*functions(source), module_region(source)]:
            score = _score(region, source, score_of, framed, deepest, names, bool(covered))
            if score > 0:
                inside = [line for line in lines if region.holds(line)] if region.name != MODULE else []
                here = framed if region.name != MODULE else _outside_functions(framed, source)
                suspects.append(Suspect(region, score, frozenset(inside), here))
    suspects.sort(key=lambda s: (-s.score, s.region.path, s.region.start))
    top = suspects[0].score if suspects else 1.0
    return [Suspect(s.region, s.score / top, s.executed, s.framed) for s in suspects[:MOST_SUSPECTS]]


def _ochiai(path: str, lines: frozenset[int], passing: Sequence[Mapping[str, frozenset[int]]]) -> dict[int, float]:
    return {line: 1 / math.sqrt(1 + sum(line in c.get(path, ()) for c in passing)) for line in lines}


def _score(
    region: Region,
    source: Source,
    ochiai: Mapping[int, float],
    framed: frozenset[int],
    deepest: int,
    names: set[str],
    has_coverage: bool,
) -> float:
    if region.name == MODULE:
        inside = _outside_functions(framed, source)
        if parse(source.text) is None:
            return LAST_FRAME if framed or not has_coverage else 0.0
        return MODULE_CODE + (LAST_FRAME if deepest in inside else OTHER_FRAME if inside else 0.0)
    body = [score for line, score in ochiai.items() if region.start < line <= region.end or line == region.end]
    score = max(body, default=0.0)
    if any(region.holds(line) for line in framed):
        score += LAST_FRAME if region.holds(deepest) else OTHER_FRAME
    short = region.name.rpartition(".")[2]
    if short in names or (short == "__init__" and region.name.split(".")[0] in names):
        score += NAMED_IN_TEST
    if not body and has_coverage and score <= NAMED_IN_TEST:
        return 0.0  # the failing test does not run it
    return score if score else (0.0 if has_coverage else NOT_COVERED)


def _outside_functions(lines: frozenset[int], source: Source) -> frozenset[int]:
    inner = functions(source)
    return frozenset(line for line in lines if not any(r.start < line <= r.end for r in inner))


def _module_named(path: str, names: set[str]) -> bool:
    stem = path.rpartition("/")[2].removesuffix(".py")
    return stem in names or (stem == "__init__" and path.split("/")[-2:][0] in names)
