"""The functions of a Python file, and the module-level code around them, as regions that a candidate may edit."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from lsp_agent.agent.source import Source

MODULE = "<module>"
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Region:
    """A function (decorators and nested functions included), or a file's module- and class-level statements."""

    path: str
    name: str
    """Qualified name, such as `Class.method`; `MODULE` for module-level code."""
    start: int
    """First line, 1-based."""
    end: int
    """Last line, inclusive."""

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    def holds(self, line: int) -> bool:
        """Whether `line` lies in it."""
        return self.start <= line <= self.end


def parse(text: str) -> ast.Module | None:
    """Parse Python; None when it is not valid."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def functions(source: Source) -> list[Region]:
    """Outermost functions and methods of a file, in order; empty when it does not parse."""
    tree = parse(source.text)
    return [] if tree is None else [_region(source.path, name, node) for name, node in _outermost(tree)]


def module_region(source: Source) -> Region:
    """The region of a file's module-level code; it spans the file."""
    return Region(source.path, MODULE, 1, max(1, source.text.count("\n") + 1))


def same_region(source: Source, region: Region) -> Region | None:
    """Find a region again in another version of its file, by name and nearest line."""
    if region.name == MODULE:
        return module_region(source)
    found = [r for r in functions(source) if r.name == region.name]
    return min(found, key=lambda r: abs(r.start - region.start), default=None)


def find_function(tree: ast.Module, region: Region) -> FunctionNode | None:
    """The syntax node of a region, by name and nearest line."""
    found = [node for name, node in _outermost(tree) if name == region.name]
    return min(found, key=lambda node: abs(node.lineno - region.start), default=None)


def _outermost(tree: ast.Module) -> list[tuple[str, FunctionNode]]:
    found: list[tuple[str, FunctionNode]] = []

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, FunctionNode):
                found.append((prefix + node.name, node))
            elif isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.If | ast.Try | ast.With):
                for field in ("body", "orelse", "finalbody"):
                    walk(getattr(node, field, []), prefix)

    walk(tree.body, "")
    return found


def _region(path: str, name: str, node: FunctionNode) -> Region:
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return Region(path, name, first, node.end_lineno or node.lineno)
