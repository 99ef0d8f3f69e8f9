"""HumanEvalFix (HumanEvalPack, bigcode-project/octopack, MIT): one buggy function and its test, as a small repository.

Each task becomes a module and a pytest file whose asserts pytest can explain. The reference solutions play no part.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path

from lsp_agent.errors import ExitCode, UserError

MODULE_NAME = "solution"


@dataclass(frozen=True)
class Task:
    """One task of the file."""

    task_id: str
    entry_point: str
    module: str
    """The buggy module's text."""
    test: str
    """A program text: defines `check`, calls it with the function, raises on a wrong result."""
    bug_type: str = ""

    @property
    def test_name(self) -> str:
        """Name of the pytest function that the task's test becomes."""
        return f"test_{self.entry_point}"

    @property
    def folder_name(self) -> str:
        """The task's id as a folder name."""
        return self.task_id.replace("/", "_").lower()


def load(path: Path) -> list[Task]:
    """Read a JSON-lines file of tasks; raises `UserError` for anything else."""
    tasks = []
    try:
        for line in path.read_text("utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                module = row["declaration"] + row["buggy_solution"]
                if row.get("import") and row["import"] not in module:
                    module = f"{row['import']}\n\n{module}"
                tasks.append(Task(row["task_id"], row["entry_point"], module, row["test"], row.get("bug_type", "")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a HumanEvalFix JSON-lines file ({error}).", ExitCode.USAGE) from error
    return tasks


def write_repository(task: Task, folder: Path) -> None:
    """Write the task's module and its pytest file into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{MODULE_NAME}.py").write_text(task.module.rstrip() + "\n", "utf-8")
    (folder / f"test_{MODULE_NAME}.py").write_text(pytest_module(task), "utf-8")


def pytest_module(task: Task) -> str:
    """Turn the task's test program into a pytest file.

    `def check(f): …` followed by `check(f)` becomes `def test_f(): …` with the same body, so that a failure's traceback
    and introspection show the failing assert; any other program is kept whole inside one test function.
    """
    text = task.test.strip("\n") + "\n"
    tree = ast.parse(text)
    lines = text.split("\n")
    names = _defined(ast.parse(task.module)) & _read(tree) | {task.entry_point}
    imports = f"from {MODULE_NAME} import {', '.join(sorted(names))}\n\n\n"
    check = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"), None)
    call = tree.body[-1]
    if check is None or not _calls_check(call, task.entry_point) or len(check.args.args) != 1:
        body = "\n".join("    " + line if line.strip() else line for line in lines).rstrip()
        return f"{imports}def {task.test_name}():\n{body}\n"
    parameter = check.args.args[0].arg
    header = f"def {task.test_name}():"
    alias = [] if parameter == task.entry_point else [f"    {parameter} = {task.entry_point}"]
    one_line = lines[check.lineno - 1].rstrip().endswith(":")
    first = check.lineno if one_line else check.body[0].lineno - 1  # with the comments above the first statement
    before, body_lines = lines[: check.lineno - 1], lines[first : check.end_lineno]
    while body_lines and not body_lines[0].strip():
        body_lines.pop(0)
    between = lines[check.end_lineno or check.lineno : call.lineno - 1]
    parts = [*before, header, *alias, *body_lines, *between]
    return imports + "\n".join(parts).strip("\n") + "\n"


def _calls_check(node: ast.stmt, entry_point: str) -> bool:
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    call = node.value
    return (
        isinstance(call.func, ast.Name)
        and call.func.id == "check"
        and [a.id for a in call.args if isinstance(a, ast.Name)] == [entry_point]
    )


def _defined(tree: ast.Module) -> set[str]:
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}


def _read(tree: ast.Module) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
