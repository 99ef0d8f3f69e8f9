"""The whole function again, under the chat template: dearer, and for bugs that no single span holds."""

from __future__ import annotations

import ast
import re
import textwrap

from lsp_agent.agent.candidates import Ask
from lsp_agent.agent.prompts import Problem, View, rewrite
from lsp_agent.agent.regions import FunctionNode, find_function, parse
from lsp_agent.chat_model import Sampling

DIAGNOSIS_TOKENS = 100
FENCE = re.compile(r"```[a-zA-Z]*\n(.*?)(?:```|\Z)", re.DOTALL)


def ask(stage: str, view: View, problem: Problem, sampling: Sampling, *, n: int = 1, diagnose: bool = True) -> Ask:
    """Ask for the whole corrected function."""
    from dataclasses import replace

    most = int(len(view.code) / 2.5) + 60 + (DIAGNOSIS_TOKENS if diagnose else 0)
    return Ask(
        stage=stage,
        region=view.region,
        line=view.region.start,
        sampling=replace(sampling, max_tokens=min(most, 700)),
        build=lambda answer: splice_function(view, answer),
        n=n,
        messages=tuple(rewrite(view, problem, diagnose=diagnose)),
    )


def splice_function(view: View, answer: str) -> str | None:
    """Put the answer's function in the place of the region; None when the answer holds no such function."""
    text = view.source.text
    tree = parse(text)
    old = find_function(tree, view.region) if tree is not None else None
    if old is None:
        return None
    for code in _blocks(answer):
        answered = parse(code)
        if answered is None:
            continue
        new = next((n for n in ast.walk(answered) if isinstance(n, FunctionNode) and n.name == old.name), None)
        if new is None:
            continue
        lines = code.split("\n")
        first = min([new.lineno, *(d.lineno for d in new.decorator_list)])
        body = textwrap.dedent("\n".join(lines[first - 1 : new.end_lineno]))
        body = _keep_docstring(body, old)
        indent = " " * old.col_offset
        replaced = text[: view.start] + textwrap.indent(body, indent) + text[view.end :]
        return _with_imports(replaced, answered)
    return None


def _blocks(answer: str) -> list[str]:
    """Fenced blocks, last first (a diagnosis may quote code before the answer); without fences, the whole answer."""
    blocks = [textwrap.dedent(b) for b in FENCE.findall(answer)]
    return blocks[::-1] or [textwrap.dedent(answer)]


def _keep_docstring(body: str, old: FunctionNode) -> str:
    """Models drop docstrings; a fix must not."""
    tree = parse(body)
    doc = ast.get_docstring(old, clean=False)
    if tree is None or doc is None:
        return body
    node = tree.body[0]
    if not isinstance(node, FunctionNode) or ast.get_docstring(node) is not None:
        return body
    first = node.body[0]
    lines = body.split("\n")
    if first.lineno == node.lineno:
        return body
    indent = " " * first.col_offset
    quoted = f'{indent}"""{doc}"""' if '"""' not in doc else f"{indent}{doc!r}"
    return "\n".join([*lines[: first.lineno - 1], quoted, *lines[first.lineno - 1 :]])


def _with_imports(text: str, answered: ast.Module) -> str:
    """Add the answer's top-level imports that the file lacks, behind its own."""
    tree = parse(text)
    if tree is None:
        return text
    have = {ast.unparse(n) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    known = {(a.asname or a.name) for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    new = []
    for node in answered.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and ast.unparse(node) not in have:
            names = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if names & used and not names <= known:
                new.append(ast.unparse(node))
    if not new:
        return text
    imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    docstring = tree.body and isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Constant)
    after = (imports[-1].end_lineno or 0) if imports else ((tree.body[0].end_lineno or 0) if docstring else 0)
    lines = text.split("\n")
    return "\n".join([*lines[:after], *new, *lines[after:]])
