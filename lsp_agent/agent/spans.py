"""What can be blanked out of a region: statements, headers, expressions, operators, gaps, groups, the whole body.

All spans are character offsets into the file's text, so that a candidate is `text[:start] + answer + text[end:]`.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lsp_agent.agent.regions import MODULE, FunctionNode, Region, find_function, parse

Kind = Literal["statement", "header", "expression", "operator", "gap", "group", "body"]


@dataclass(frozen=True)
class Span:
    """A piece of the text: characters [start, end), empty for a gap."""

    kind: Kind
    start: int
    end: int
    line: int
    """1-based line where it starts."""
    indent: str = ""
    """Whitespace in front of its line."""

    def of(self, text: str) -> str:
        """The text it covers."""
        return text[self.start : self.end]


class Offsets:
    """Turns the syntax tree's positions (line, UTF-8 column) into character offsets."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._lines = text.split("\n")
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line) + 1)

    def at(self, line: int, column: int) -> int:
        """Offset of a 1-based line and a UTF-8 byte column."""
        content = self._lines[line - 1]
        if not content.isascii():
            column = len(content.encode()[:column].decode("utf-8", "ignore"))
        return self._starts[line - 1] + column

    def start(self, node: ast.expr | ast.stmt) -> int:
        """Where a node begins."""
        return self.at(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt) -> int:
        """Where a node ends."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.at(node.end_lineno, node.end_col_offset)

    def line_start(self, line: int) -> int:
        """Offset of the first character of a 1-based line."""
        return self._starts[min(line, len(self._lines)) - 1] if line <= len(self._lines) else len(self.text)

    def indent(self, line: int) -> str:
        """Whitespace at the beginning of a line."""
        content = self._lines[line - 1]
        return content[: len(content) - len(content.lstrip())]


def statement_spans(text: str, region: Region) -> list[Span]:
    """Every simple statement and every compound statement's header in a region, in source order.

    A file that does not parse gives one span a line.
    """
    tree = parse(text)
    offsets = Offsets(text)
    if tree is None:
        return _line_spans(text, offsets, region)
    spans: list[Span] = []
    for node in _statements(tree, region):
        indent = offsets.indent(node.lineno)
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
            if isinstance(node, ast.Try | ast.ClassDef):
                continue
            end = _header_end(text, offsets.start(node), _first_offset(offsets, body[0]))
            spans.append(Span("header", offsets.start(node), end, node.lineno, indent))
        elif not _is_docstring(node):
            spans.append(Span("statement", offsets.start(node), offsets.end(node), node.lineno, indent))
    return spans


def expression_spans(text: str, region: Region) -> list[Span]:
    """Expressions inside a region's statements, larger first within a statement, and the operators between them."""
    tree = parse(text)
    if tree is None:
        return []
    offsets = Offsets(text)
    spans: dict[tuple[int, int], Span] = {}
    for statement in _statements(tree, region):
        if _is_docstring(statement):
            continue
        for node in _own_expressions(statement):
            start, end = offsets.start(node), offsets.end(node)
            indent = offsets.indent(node.lineno)
            spans.setdefault((start, end), Span("expression", start, end, node.lineno, indent))
            for left, right in _operands(node):
                low, high = offsets.end(left), offsets.start(right)
                between = text[low:high]
                # Parentheses between the operands belong to them, not to the operator.
                if low < high and not set(between) & set("()[]{}#\n\\"):
                    spans.setdefault((low, high), Span("operator", low, high, left.end_lineno or left.lineno, indent))
    return list(spans.values())


def gap_spans(text: str, region: Region) -> list[Span]:
    """Empty spans where a missing statement could stand: before each statement's line, and at the end of each block."""
    tree = parse(text)
    if tree is None:
        return []
    offsets = Offsets(text)
    spans: dict[tuple[int, str], Span] = {}
    for node in _statements(tree, region):
        if isinstance(node, FunctionNode) and node.name == region.name.rpartition(".")[2]:
            continue
        indent = offsets.indent(node.lineno)
        own_line = text[offsets.line_start(node.lineno) : offsets.start(node)].strip() == ""
        is_elif = text.startswith("elif", offsets.start(node))
        if own_line and not is_elif:
            at = offsets.line_start(node.lineno)
            spans.setdefault((at, indent), Span("gap", at, at, node.lineno, indent))
        for block in _blocks(node):
            if block[0].lineno == node.lineno:
                continue
            line = (block[-1].end_lineno or block[-1].lineno) + 1
            at = offsets.line_start(line)
            inner = offsets.indent(block[0].lineno)
            spans.setdefault((at, inner), Span("gap", at, at, line, inner))
    return list(spans.values())


def group_spans(text: str, region: Region) -> list[Span]:
    """Groups of neighbouring lines: whole compound statements, and runs of two or three statements of a block."""
    tree = parse(text)
    if tree is None:
        return []
    offsets = Offsets(text)
    spans: dict[tuple[int, int], Span] = {}

    def add(first: ast.stmt, last: ast.stmt) -> None:
        key = (offsets.start(first), offsets.end(last))
        spans.setdefault(key, Span("group", *key, first.lineno, offsets.indent(first.lineno)))

    root = _root(tree, region)
    for node in [root, *_statements(tree, region)] if root is not None else []:
        for block in _all_blocks(node):
            body = [s for s in block if not _is_docstring(s)]
            for size in (1, 2, 3):
                for index in range(len(body) - size + 1):
                    run = body[index : index + size]
                    whole = region.name != MODULE or not any(isinstance(s, FunctionNode | ast.ClassDef) for s in run)
                    if whole and (size > 1 or _all_blocks(run[0])):
                        add(run[0], run[-1])
    return list(spans.values())


def body_span(text: str, region: Region) -> Span | None:
    """The whole body of a function, without its docstring; None for module-level code."""
    tree = parse(text)
    node = find_function(tree, region) if tree is not None else None
    if node is None:
        return None
    body = [s for s in node.body if not _is_docstring(s)]
    if not body or body[0].lineno == node.lineno:
        return None
    offsets = Offsets(text)
    start = _first_offset(offsets, body[0])
    return Span("body", start, offsets.end(body[-1]), body[0].lineno, offsets.indent(body[0].lineno))


def _root(tree: ast.Module, region: Region) -> ast.Module | FunctionNode | None:
    return tree if region.name == MODULE else find_function(tree, region)


def _statements(tree: ast.Module, region: Region) -> Iterator[ast.stmt]:
    """Statements of a region in source order, nested ones included; of module-level code, no function bodies."""
    root = _root(tree, region)
    if root is None:
        return

    def walk(node: ast.AST) -> Iterator[ast.stmt]:
        if isinstance(node, ast.stmt) and not (region.name == MODULE and isinstance(node, FunctionNode)):
            yield node
        if region.name == MODULE and isinstance(node, FunctionNode):
            return
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                yield from walk(child)

    yield from walk(root)


def _blocks(node: ast.AST) -> list[list[ast.stmt]]:
    blocks = [getattr(node, name, None) for name in ("body", "orelse", "finalbody")]
    return [b for b in blocks if isinstance(b, list) and b and isinstance(b[0], ast.stmt)]


def _all_blocks(node: ast.AST) -> list[list[ast.stmt]]:
    """Blocks of a statement, those of its except handlers and cases included."""
    inner = [*getattr(node, "handlers", []), *getattr(node, "cases", [])]
    return [*_blocks(node), *(block for part in inner for block in _blocks(part))]


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _first_offset(offsets: Offsets, node: ast.stmt) -> int:
    """Where a statement begins, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    if decorators:
        line = min(d.lineno for d in decorators)
        return offsets.line_start(line) + len(offsets.indent(line))
    return offsets.start(node)


def _header_end(text: str, start: int, body: int) -> int:
    """Offset just behind the colon that ends a compound statement's header."""
    segment = text[start:body].rstrip()
    colon = None
    lines = Offsets(segment)
    try:
        for token in tokenize.generate_tokens(io.StringIO(segment).readline):
            if token.type == tokenize.OP and token.string == ":":
                colon = lines.line_start(token.end[0]) + token.end[1]
    except (tokenize.TokenError, IndentationError):
        pass
    return start + (colon if colon is not None else len(segment))


def _own_expressions(statement: ast.stmt) -> Iterator[ast.expr]:
    """Expressions of a statement itself, outermost first, not those of its nested statements."""
    stack: list[ast.AST] = [
        c for c in ast.iter_child_nodes(statement) if not isinstance(c, ast.stmt | ast.ExceptHandler | ast.match_case)
    ]
    while stack:
        node = stack.pop(0)
        # Stores name what is assigned; blanking them alone gives nothing but renamed variables.
        stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        if isinstance(node, ast.expr) and not stored and not isinstance(node, ast.JoinedStr | ast.FormattedValue):
            yield node
        if not isinstance(node, ast.JoinedStr):
            stack.extend(ast.iter_child_nodes(node))


def _operands(node: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    if isinstance(node, ast.BinOp):
        return [(node.left, node.right)]
    if isinstance(node, ast.BoolOp):
        return list(zip(node.values, node.values[1:], strict=False))
    if isinstance(node, ast.Compare):
        return list(zip([node.left, *node.comparators], node.comparators, strict=False))
    return []


def _line_spans(text: str, offsets: Offsets, region: Region) -> list[Span]:
    spans = []
    for number, line in enumerate(text.split("\n"), 1):
        if region.holds(number) and line.strip() and not line.strip().startswith("#"):
            indent = offsets.indent(number)
            start = offsets.line_start(number) + len(indent)
            spans.append(Span("statement", start, start + len(line.strip()), number, indent))
    return spans
