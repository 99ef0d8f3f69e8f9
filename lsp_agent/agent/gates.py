"""What a candidate must pass before tests run: it parses, compiles, names nothing undefined, and is new."""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping

from pyflakes.checker import Checker
from pyflakes.messages import (
    ContinueOutsideLoop,
    DuplicateArgument,
    ReturnOutsideFunction,
    UndefinedExport,
    UndefinedLocal,
    UndefinedName,
    YieldOutsideFunction,
)

FATAL = (
    UndefinedName,
    UndefinedLocal,
    UndefinedExport,
    DuplicateArgument,
    ReturnOutsideFunction,
    ContinueOutsideLoop,
    YieldOutsideFunction,
)


class Gates:
    """Refuses candidates that need no test run; remembers those that were let through."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._problems: dict[str, Counter[str]] = {}

    def refuse(self, path: str, before: str, texts: Mapping[str, str]) -> str | None:
        """Why the candidate `texts` (path -> whole text of every changed file) is not worth a test run; None: it is.

        `path` is the file this candidate changes, `before` its text in the state that the candidate starts from.
        """
        text = texts[path]
        tree, problem = _compile(text)
        if tree is None:
            return problem
        start, _ = _compile(before)
        if start is not None and ast.dump(tree) == ast.dump(start):
            return "no change"
        new = _fatal(tree) - self._known(before)
        if new:
            return next(iter(new))
        key = self._key(texts)
        if key in self._seen:
            return "tried before"
        self._seen.add(key)
        return None

    def _known(self, text: str) -> Counter[str]:
        if text not in self._problems:
            tree, _ = _compile(text)
            self._problems[text] = _fatal(tree) if tree is not None else Counter()
        return self._problems[text]

    @staticmethod
    def _key(texts: Mapping[str, str]) -> str:
        parts = []
        for path, text in sorted(texts.items()):
            tree, _ = _compile(text)
            parts.append(f"{path}\0{ast.dump(tree) if tree is not None else text}")
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _compile(text: str) -> tuple[ast.Module | None, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a candidate's odd escapes are no business of the terminal
            tree = ast.parse(text)
            compile(text, "<candidate>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return None, f"does not parse: {error}"
    return tree, ""


def _fatal(tree: ast.Module) -> Counter[str]:
    """Messages without positions, counted: a candidate may move an old problem but not add one."""
    try:
        messages = Checker(tree, filename="<candidate>").messages
    except (RecursionError, AttributeError):  # pyflakes gives up on some odd trees; the tests will judge them
        return Counter()
    return Counter(m.message % m.message_args for m in messages if isinstance(m, FATAL))
