"""What the model reads: short prompts that begin alike, so that the engine reads each shared part once.

Small models get worse with length, so a prompt holds the suspect function, what it uses, and the failing test, no more;
whatever is cut is cut visibly.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from lsp_agent.agent.regions import MODULE, Region, functions, parse
from lsp_agent.agent.source import Source
from lsp_agent.agent.spans import Span
from lsp_agent.chat_model import Message
from lsp_agent.testing.results import TestResult

WHOLE_FILE_LINES = 60
"""A file up to this long is shown whole; of a longer one, imports, what the function uses, and the function."""
TEST_LINES = 40
NEIGHBOUR_LINES = 40
PREFIX_CHARACTERS = 5000
SUFFIX_CHARACTERS = 2500
SCORED_CHARACTERS = 8000
"""A region longer than this is not scored: reading it would cost more than the ranking gains."""
CUT = "# ... (cut)"


@dataclass(frozen=True)
class FileTokens:
    """The special tokens a model's pretraining put between the files of a repository."""

    repo_name: str = "<|repo_name|>"
    file_sep: str = "<|file_sep|>"


@dataclass(frozen=True)
class Problem:
    """One failing test as the model sees it."""

    nodeid: str
    path: str
    test: str
    """Source of the failing test, with the imports of its file."""
    failure: str
    """Exception and message, a few lines."""


@dataclass(frozen=True)
class View:
    """The part of a file that a prompt shows: `head` before the region, the region itself, `tail` after it."""

    source: Source
    region: Region
    head: str
    start: int
    """Offsets of the region in the file's text."""
    end: int
    tail: str
    whole: bool = True
    """Whether head, region and tail are the whole file."""

    def prefix(self, at: int) -> str:
        """What is shown before an offset of the region: of a long one, the lines nearest to it."""
        before = self.source.text[self.start : at]
        if len(before) <= PREFIX_CHARACTERS:
            return self.head + before
        cut = before.find("\n", len(before) - PREFIX_CHARACTERS) + 1
        return f"{self.head}{CUT}\n{before[cut:]}"

    def suffix(self, at: int) -> str:
        """What is shown after an offset of the region: of a long one, the lines nearest to it."""
        after = self.source.text[at : self.end]
        if len(after) <= SUFFIX_CHARACTERS:
            return after + self.tail
        return f"{after[: after.rfind(chr(10), 0, SUFFIX_CHARACTERS) + 1]}{CUT}\n"

    @property
    def code(self) -> str:
        """The region's own text."""
        return self.source.text[self.start : self.end]


def problem(result: TestResult, test_source: str) -> Problem:
    """Cut a failing test out of its file; without a test function (a collection error) there is no test to show."""
    tree = parse(test_source)
    lines = test_source.split("\n")
    shown = ""
    if tree is not None:
        regions = functions(Source(result.path, test_source))
        found = next((r for r in regions if r.holds(result.line)), None)
        if found is None:
            name = result.nodeid.rpartition("::")[2].partition("[")[0]
            found = next((r for r in regions if r.name.rpartition(".")[2] == name), None)
        imports = [ast.get_source_segment(test_source, n) or "" for n in tree.body if _is_import(n)]
        imports = [i for i in imports if i not in ("import pytest",)]
        if found is not None:
            failing = max((f.line for f in result.frames if f.path == result.path), default=found.start)
            body = _around(lines[found.start - 1 : found.end], failing - found.start, TEST_LINES)
            shown = "\n".join([*imports, "", *_dedent(body)]).strip("\n")
    failure = result.message.strip() or result.longrepr.strip()[-600:]
    failure = "\n".join(failure.split("\n")[:8])[:600]
    if result.exception and not failure.startswith(result.exception):
        failure = f"{result.exception}: {failure}"
    return Problem(result.nodeid, result.path, shown, failure)


def view(source: Source, region: Region) -> View:
    """Choose what of a file to show around a region."""
    lines = source.text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    if region.name == MODULE:
        return View(source, region, "", 0, len(source.text), "")
    start, end = starts[region.start - 1], min(starts[region.end] - 1, len(source.text))
    if len(lines) <= WHOLE_FILE_LINES:
        return View(source, region, source.text[:start], start, end, source.text[end:])
    return View(source, region, _head(source, region, lines), start, end, "\n", whole=False)


def infill(
    view: View, span: Span, problem: Problem | None, tokens: FileTokens | None, hint: str = ""
) -> tuple[str, str]:
    """The prefix and suffix of a fill-in-the-middle request that blanks `span`; `hint` is a comment in front of it."""
    prefix = view.prefix(span.start)
    if hint:
        line = prefix.rfind("\n") + 1
        prefix = f"{prefix[:line]}{span.indent}# {hint}\n{prefix[line:]}"
    if span.kind == "gap":
        prefix += span.indent
    return context(view.source.path, problem, tokens) + prefix, view.suffix(span.end)


def context(path: str, problem: Problem | None, tokens: FileTokens | None) -> str:
    """The failing test as a file in front of the file at `path`."""
    if problem is None:
        return ""
    if not problem.test:  # a file that cannot be collected: there is only the reason
        return f"# {problem.path}: {' '.join(problem.failure.split())[:200]}\n# {path}\n"
    if tokens is None:
        return f"# {problem.path}\n{problem.test}\n\n\n# {path}\n"
    return f"{tokens.repo_name}project\n{tokens.file_sep}{problem.path}\n{problem.test}\n{tokens.file_sep}{path}\n"


def fitting(prefix: str, suffix: str, characters: int) -> tuple[str, str]:
    """Cut a fill-in-the-middle request to `characters`: what is nearest to the blank stays, two thirds before it."""
    if len(prefix) + len(suffix) <= characters:
        return prefix, suffix
    after = max(characters // 3, characters - len(prefix))
    if len(suffix) > after:
        suffix = f"{suffix[: suffix.rfind(chr(10), 0, after) + 1]}{CUT}\n"
    before = max(0, characters - len(suffix))
    if len(prefix) > before:
        rest = prefix[len(prefix) - before :]
        prefix = f"{CUT}\n{rest[rest.find(chr(10)) + 1 :]}"
    return prefix, suffix


def wrong_hint(span: Span, text: str) -> str:
    """A comment that says which code was there and is wrong."""
    return f"FIXME: `{' '.join(span.of(text).split())[:100]}` is wrong here"


def score_text(view: View, problem: Problem | None) -> tuple[str, int] | None:
    """A text to score and the offset in it of the file's first character; None when it is too long.

    Regions of a file that is shown whole share one text, so that it is read once.
    """
    before = context(view.source.path, problem, None)
    if view.whole:
        text, offset = view.source.text, len(before)
    else:
        before += view.head
        text, offset = view.code, len(before) - view.start
    return (before + text, offset) if len(text) <= SCORED_CHARACTERS else None


def rewrite(view: View, problem: Problem, *, diagnose: bool) -> list[Message]:
    """Ask for the whole function, corrected; `diagnose` asks what is wrong first."""
    name = view.region.name.rpartition(".")[2]
    write = f"the whole corrected function `{name}`, and nothing else of the file, in one ```python block"
    ask = f"First say in one sentence what is wrong. Then write {write}." if diagnose else f"Write {write}."
    parts = []
    if view.head.strip():
        parts.append(f"The code around it:\n```python\n{view.head.strip()}\n```")
    parts.append(f"This function has a bug:\n```python\n{view.code}\n```")
    if problem.test:
        parts.append(f"This test fails:\n```python\n{problem.test}\n```")
    parts.append(f"The failure:\n```\n{problem.failure}\n```")
    parts.append(f"{ask} Do not change the test or the function's name.")
    return [
        {"role": "system", "content": "You fix bugs in Python code with the smallest change."},
        {"role": "user", "content": "\n\n".join(parts)},
    ]


def _head(source: Source, region: Region, lines: list[str]) -> str:
    """Imports, module-level names and signatures that the region uses, and its class line."""
    tree = parse(source.text)
    if tree is None:
        return "\n".join(lines[max(0, region.start - 1 - NEIGHBOUR_LINES) : region.start - 1]) + "\n"
    used = set(re.findall(r"[A-Za-z_]\w*", "\n".join(lines[region.start - 1 : region.end])))
    shown: list[str] = []
    for node in tree.body:
        first, last = node.lineno, node.end_lineno or node.lineno
        if _is_import(node):
            shown.append("\n".join(lines[first - 1 : last]))
        elif isinstance(node, ast.Assign | ast.AnnAssign) and last - first < 12:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id in used for t in targets):
                shown.append("\n".join(lines[first - 1 : last]))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name in used and not region.start <= first <= region.end:
                shown.append(_signature(node, lines))
        elif isinstance(node, ast.ClassDef):
            inside = first <= region.start <= last
            if inside or node.name in used:
                shown.append(_class(node, lines, used, region, inside=inside))
    # The region's own class must come last, so that the region continues it.
    shown.sort(key=lambda text: text.endswith("\n#"))
    return "\n\n".join(s.removesuffix("\n#") for s in shown) + "\n\n"


def _class(node: ast.ClassDef, lines: list[str], used: set[str], region: Region, *, inside: bool) -> str:
    parts = [lines[node.lineno - 1]]
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            if not region.start <= item.lineno <= region.end and item.name in {*used, "__init__"}:
                whole = item.name == "__init__" and (item.end_lineno or item.lineno) - item.lineno < 12
                last = item.end_lineno or item.lineno
                parts.append("\n".join(lines[item.lineno - 1 : last]) if whole else _signature(item, lines))
        elif isinstance(item, ast.Assign | ast.AnnAssign) and (item.end_lineno or item.lineno) - item.lineno < 6:
            parts.append("\n".join(lines[item.lineno - 1 : item.end_lineno]))
    return "\n".join(parts) + ("\n#" if inside else "")


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    indent = " " * node.col_offset
    first_statement = node.body[0]
    signature = "\n".join(lines[node.lineno - 1 : max(node.lineno, first_statement.lineno - 1)])
    doc = (ast.get_docstring(node) or "").split("\n")[0]
    if first_statement.lineno == node.lineno:
        return lines[node.lineno - 1]
    return f'{signature}\n{indent}    """{doc}"""\n{indent}    ...' if doc else f"{signature}\n{indent}    ..."


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _around(lines: list[str], index: int, most: int) -> list[str]:
    """At most `most` lines: the first two, and those around `index`; cuts are marked."""
    if len(lines) <= most:
        return lines
    low = max(2, min(index - most // 2, len(lines) - (most - 2)))
    high = low + most - 2
    indent = lines[1][: len(lines[1]) - len(lines[1].lstrip())] or "    "
    middle = [indent + CUT] if low > 2 else []
    after = [indent + CUT] if high < len(lines) else []
    return [*lines[:2], *middle, *lines[low:high], *after]


def _dedent(lines: list[str]) -> list[str]:
    width = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    return [line[width:] if not line[:width].strip() else line for line in lines]
