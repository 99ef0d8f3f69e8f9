"""Runs the agent, or the single-shot control, on tasks; one JSON line a task, resumable."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsp_agent.agent import events
from lsp_agent.agent.fix import fix
from lsp_agent.agent.request import FixRequest, Limits
from lsp_agent.borrowed import Borrowed
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatModel
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.evals.humanevalfix import Task, write_repository
from lsp_agent.evals.single_shot import single_shot
from lsp_agent.testing.pytest_runner import PytestRunner
from lsp_agent.workspace.workspace import Workspace

Row = dict[str, Any]
TEST_TIMEOUT_S = 20.0
NO_PLUGINS = "PYTEST_DISABLE_PLUGIN_AUTOLOAD"
"""The tasks need no plugin, and loading those of our own environment takes longer than the tests."""


def run_task(
    task: Task, model: ChatModel, max_seconds: float, seed: int, cancel: CancelToken, *, control: bool = False
) -> Row:
    """Make the task's repository in a temporary folder and work on it; every end is a row but `Cancelled`."""
    began = time.monotonic()
    row: Row = {"task_id": task.task_id, "bug_type": task.bug_type, **settings(model.name, seed, max_seconds)}
    row["solved"] = False
    with tempfile.TemporaryDirectory(prefix="lsp-agent-eval-") as folder:
        root = Path(folder).resolve() / "project"
        write_repository(task, root)
        workspace, runner = Workspace(root), PytestRunner(root, pass_environment=(NO_PLUGINS,))
        try:
            if control:
                row |= single_shot(workspace, runner, model, max_seconds, cancel)
            else:
                request = FixRequest(
                    limits=Limits(max_turns=1000, max_seconds=max_seconds), seed=seed, test_timeout_s=TEST_TIMEOUT_S
                )
                result = fix(request, workspace, runner, lambda *_: Borrowed(model), events.ignore, cancel)
                row |= {
                    "solved": result.status == "green",
                    "status": result.status,
                    "stage": result.solved_by[-1] if result.solved_by else None,
                    "stages": list(result.solved_by),
                    "turns": result.turns,
                    "tokens_read": result.usage.prompt_tokens - result.usage.cached_tokens,
                    "tokens_cached": result.usage.cached_tokens,
                    "tokens_written": result.usage.completion_tokens,
                    "diff": result.diff,
                    "reason": result.reason,
                    "trajectory": str(result.trajectory),
                }
        except UserError as error:
            row |= {"status": "error", "reason": str(error)}
    return row | {"seconds": round(time.monotonic() - began, 2)}


def settings(model: str, seed: int, max_seconds: float) -> Row:
    """The fields of a row that all rows of one file must share."""
    return {"model": model, "seed": seed, "max_seconds": max_seconds}


def check_same_settings(path: Path, rows: Sequence[Row], wanted: Row) -> None:
    """Raise `UserError` when rows in `path` were made otherwise: their sum would measure nothing."""
    for row in rows:
        for name, value in wanted.items():
            if row.get(name, value) != value:
                option = name.replace("_", "-")
                raise UserError(
                    f"{path} holds results of --{option} {row[name]}, not {value}: give another folder to --out.",
                    ExitCode.USAGE,
                )


def read_rows(path: Path) -> list[Row]:
    """Rows written so far; a line that a kill cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def append_row(out: Path, row: Row) -> None:
    """Append one line; a line that a kill cut short before it is closed first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    cut = out.exists() and not out.read_bytes().endswith(b"\n") and out.stat().st_size > 0
    with out.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(row) + "\n")


def summary(rows: Sequence[Row]) -> Row:
    """Solved and total, medians over the solved tasks, tokens, and which stage solved how many."""
    solved = [r for r in rows if r["solved"]]
    times = [r["seconds"] for r in solved]
    return {
        "solved": len(solved),
        "total": len(rows),
        "rate": round(len(solved) / len(rows), 3) if rows else 0.0,
        "median_seconds_solved": round(statistics.median(times), 1) if times else None,
        "seconds_total": round(sum(r["seconds"] for r in rows), 1),
        "median_turns_solved": statistics.median(r.get("turns", 1) for r in solved) if solved else None,
        "tokens_read": sum(r.get("tokens_read", 0) for r in rows),
        "tokens_written": sum(r.get("tokens_written", 0) for r in rows),
        "stages": dict(Counter(r.get("stage") or "?" for r in solved).most_common()),
        "errors": [r["task_id"] for r in rows if r.get("status") == "error"],
        "unsolved": [r["task_id"] for r in rows if not r["solved"]],
    }
