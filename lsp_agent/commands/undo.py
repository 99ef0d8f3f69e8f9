"""`lsp-agent undo`: restore the state before a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from lsp_agent.commands.text import printable
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.workspace.changes import FileChange, unified_diff
from lsp_agent.workspace.checkpoints import Checkpoints, UndoResult, find_root


@click.command()
@click.argument("run", required=False)
@click.option("--path", default=".", type=click.Path(path_type=Path), help="The project, or a folder in it.")
@click.option("--list", "list_runs", is_flag=True, help="Show the runs, newest first, and change nothing.")
@click.option("--dry-run", is_flag=True, help="Show the diff that undoing would make, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def undo(run: str | None, path: Path, list_runs: bool, dry_run: bool, as_json: bool) -> None:
    """Restore the state before RUN (default: the last run not undone), also after later runs.

    Edits made since are kept where they merge; where they do not, nothing is changed. Undoing an undo redoes the run.
    Exit code: 0 done, 1 refused because of a later edit, 2 no such run, 3 nothing to undo.
    """
    try:
        checkpoints = Checkpoints(find_root(path))
        for message in checkpoints.recover():
            click.echo(f"lsp-agent: {message}", err=True)
        if list_runs:
            _print_runs(checkpoints, as_json)
        elif dry_run:
            _print_plan(checkpoints.plan_undo(run), as_json)
        else:
            _print_result(checkpoints.undo(run), as_json)
    except UserError as error:
        if as_json:
            status = {ExitCode.NOT_GREEN: "conflict", ExitCode.USAGE: "unknown_run"}.get(error.exit_code, "failed")
            _print_json({"status": status, "message": str(error)})
        raise


def _print_runs(checkpoints: Checkpoints, as_json: bool) -> None:
    runs = [info for info in checkpoints.runs() if info.files]
    if as_json:
        shown = [
            {
                "id": info.id,
                "status": info.status,
                "time": info.time,
                "files": _clean(info.files),
                "undoes": info.undoes,
            }
            for info in runs
        ]
        _print_json({"status": "listed", "runs": shown})
        return
    if not runs:
        click.echo("No run has changed a file of this workspace.")
    for info in runs:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.time))
        click.echo(f"{info.id}  {when}  {info.status:<15}  {', '.join(_clean(info.files))}")


def _print_plan(changes: list[FileChange], as_json: bool) -> None:
    diff = unified_diff(changes)
    if as_json:
        _print_json({"status": "dry_run", "files": _described(changes), "diff": _clean([diff])[0]})
    else:
        click.echo(_clean([diff])[0] or "Nothing would change: the files are already as before the run.", nl=not diff)


def _print_result(result: UndoResult, as_json: bool) -> None:
    if as_json:
        shown = {"status": "undone", "run": result.run_id, "undo": result.undo_id, "merged": _clean(result.merged)}
        _print_json({**shown, "files": _described(result.changes)})
        return
    for file in _described(result.changes):
        click.echo(f"{file['action']:<9} {file['path']}")
    kept = f"; later edits were kept in {', '.join(_clean(result.merged))}" if result.merged else ""
    redo = f"`lsp-agent undo {result.undo_id}` redoes it"
    click.echo(f"The run {result.run_id} is undone{kept}; {redo}.")


def _described(changes: Iterable[FileChange]) -> list[dict[str, str]]:
    def action(change: FileChange) -> str:
        if change.after is None:
            return "removed"
        return "recreated" if change.before is None else "restored"

    return [{"path": _clean([change.path])[0], "action": action(change)} for change in changes]


def _clean(texts: Iterable[str]) -> list[str]:
    """Texts that any terminal and JSON reader can take: bytes that are not UTF-8 are shown escaped."""
    return [printable(text) for text in texts]


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value))
