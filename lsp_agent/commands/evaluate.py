"""`lsp-agent eval`: measure the agent on executable tasks."""

from __future__ import annotations

import json
import os
import queue
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lsp_agent.cancel import CancelToken
from lsp_agent.commands.fix import interruptible
from lsp_agent.errors import ExitCode, UserError

if TYPE_CHECKING:
    from lsp_agent.config import Backend
    from lsp_agent.evals.humanevalfix import Task


@click.group()
def evaluate() -> None:
    """Measure the agent on executable tasks."""


@evaluate.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--limit", type=click.IntRange(1), help="Only the first N tasks.")
@click.option("--tasks", "names", metavar="A,B", help="Only these task ids.")
@click.option("--model", help="An installed model (default: what `lsp-agent doctor` names).")
@click.option("--max-seconds", type=click.FloatRange(1), default=120, show_default=True, help="Most time a task.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option("--baseline", type=click.Choice(["single-shot"]), help="Run the control instead of the agent.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the results: a second run goes on there.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Tasks at once, on one engine.")
def humanevalfix(
    file: Path,
    limit: int | None,
    names: str | None,
    model: str | None,
    max_seconds: float,
    seed: int,
    baseline: str | None,
    out: Path | None,
    jobs: int,
) -> int:
    """Repair the tasks of a HumanEvalFix FILE (JSON lines), each as a small repository with a pytest test.

    Prints a line a task and a summary as one JSON object. With --out also writes fix.jsonl (a row a task) and
    fix-summary.json there, or single-shot.jsonl and single-shot-summary.json; a second run with the same model, seed
    and time goes on where the first ended.
    """
    from lsp_agent.config import load_settings
    from lsp_agent.evals import harness
    from lsp_agent.evals.humanevalfix import load

    backend = load_settings(None).backend
    os.environ[harness.NO_PLUGINS] = "1"
    tasks = load(file)
    if names:
        wanted = {n.strip() for n in names.split(",")}
        unknown = wanted - {t.task_id for t in tasks}
        if unknown:
            raise UserError(f"{file} has no task {sorted(unknown)[0]}.", ExitCode.USAGE)
        tasks = [t for t in tasks if t.task_id in wanted]
    tasks = tasks[:limit]
    kind = baseline or "fix"
    results = out / f"{kind}.jsonl" if out else None
    rows = harness.read_rows(results) if results else []
    if results and rows:
        harness.check_same_settings(results, rows, harness.settings(_model_name(model, backend), seed, max_seconds))
    done = {row["task_id"] for row in rows}
    todo: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        if task.task_id not in done:
            todo.put(task)
    cancel = CancelToken()
    lock = threading.Lock()
    problems: list[BaseException] = []

    def work() -> None:
        from lsp_agent.models import open_model

        try:
            opened = open_model(model, cancel, backend=backend)
            try:
                while not cancel.cancelled:
                    try:
                        task = todo.get_nowait()
                    except queue.Empty:
                        return
                    row = harness.run_task(task, opened, max_seconds, seed, cancel, control=baseline is not None)
                    with lock:
                        rows.append(row)
                        if results:
                            harness.append_row(results, row)
                        _print_row(row, len(rows), len(tasks))
            finally:
                opened.close()
        except BaseException as error:
            problems.append(error)
            cancel.cancel()

    with interruptible(cancel):
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, max(1, todo.qsize())))]
        if not todo.empty():
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # short waits, so that the main thread can take a signal
    if problems:
        raise next((p for p in problems if isinstance(p, UserError)), problems[0])
    wanted_ids = {t.task_id for t in tasks}
    summary: dict[str, Any] = {"kind": kind, **harness.summary([r for r in rows if r["task_id"] in wanted_ids])}
    click.echo(json.dumps(summary, indent=2))
    if out:
        (out / f"{kind}-summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    return ExitCode.OK


def _model_name(model: str | None, backend: Backend | None) -> str:
    """The name that rows made with this choice of a model carry."""
    from lsp_agent.models import SCRIPTED
    from lsp_agent.models.store import resolve

    if model is None and backend is not None:
        from lsp_agent.engine.remote.backend import check

        return check(backend).name
    return model if model and model.startswith(SCRIPTED) else resolve(model).name


def _print_row(row: dict[str, Any], number: int, total: int) -> None:
    outcome = f"solved by {row.get('stage')}" if row["solved"] else f"not solved ({row.get('reason') or row['status']})"
    turns = row.get("turns", 0)
    click.echo(f"{number}/{total} {row['task_id']}: {outcome}, {turns} turns, {row['seconds']:.1f} s", err=True)
