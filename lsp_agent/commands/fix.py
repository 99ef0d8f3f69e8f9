"""`lsp-agent fix`: make failing tests pass, with proof, and show the diff."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from lsp_agent.cancel import CancelToken
from lsp_agent.commands.text import printable
from lsp_agent.errors import Cancelled, ExitCode, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from lsp_agent.agent.events import Event
    from lsp_agent.agent.request import FixResult

NAMES_SHOWN = 20


@click.command()
@click.argument("path", default=".", type=click.Path(path_type=Path))
@click.option("--test", "tests", multiple=True, metavar="NODEID", help="Fix this test only (repeatable).")
@click.option("--model", help="An installed model (default: what `lsp-agent doctor` names).")
@click.option("--max-turns", type=click.IntRange(1), help="Most calls of the model (default: 300).")
@click.option("--max-seconds", type=click.FloatRange(1), help="Most time (default: 600).")
@click.option("--max-tokens", type=click.IntRange(1), default=400_000, show_default=True, help="Most tokens.")
@click.option("--test-timeout", type=click.FloatRange(1), help="Most seconds a test run (default: 300).")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option("--dry-run", is_flag=True, help="Show the proven diff, and change nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end, and nothing else.")
def fix(
    path: Path,
    tests: tuple[str, ...],
    model: str | None,
    max_turns: int | None,
    max_seconds: float | None,
    max_tokens: int,
    test_timeout: float | None,
    seed: int,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Make the failing tests of the project at PATH pass, without changing any test.

    What is not given here comes from LSP_AGENT_* variables and the project's lsp-agent.toml, as in the server.
    Exit code: 0 green, or nothing was failing; 1 not green (the best attempt is shown, no file is changed); 2 wrong
    usage; 3 no tests, no model or no runner; 130 cancelled.
    """
    from lsp_agent.agent.fix import fix as run_fix
    from lsp_agent.agent.request import FixRequest, Limits
    from lsp_agent.config import load_settings
    from lsp_agent.models import SCRIPTED, open_model
    from lsp_agent.models.store import resolve
    from lsp_agent.testing.integrity import ProtectedFiles
    from lsp_agent.testing.pytest_runner import PytestRunner
    from lsp_agent.testing.sandbox import Sandbox
    from lsp_agent.workspace.checkpoints import Checkpoints
    from lsp_agent.workspace.workspace import Workspace

    progress = Progress(quiet=as_json)
    cancel = CancelToken()
    try:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: give the folder of the project.", ExitCode.USAGE)
        workspace = Workspace(path)
        checkpoints = Checkpoints(workspace.root, protected=ProtectedFiles(workspace.root))
        for message in checkpoints.recover():
            click.echo(f"lsp-agent: {message}", err=True)
        given = {"model": model, "max_turns": max_turns, "max_seconds": max_seconds}
        settings = load_settings(workspace.root, {**given, "test_timeout_seconds": test_timeout})
        limits = Limits(settings.max_turns, settings.max_seconds, max_tokens)
        if model is not None and not model.startswith(SCRIPTED):
            resolve(model)  # a wrong name is said before the tests are run
        request = FixRequest(tests, settings.model, limits, seed, settings.test_timeout_seconds)
        sandbox = Sandbox(workspace.root, enabled=settings.sandbox)
        if sandbox.level != "full":
            click.echo(f"lsp-agent: the tests run without the sandbox: {sandbox.reason}", err=True)
        runner = PytestRunner(
            workspace.root, interpreter=settings.interpreter, pytest_args=settings.pytest_args, sandbox=sandbox
        )
        with interruptible(cancel), progress:
            opener = partial(open_model, backend=settings.backend)
            result = run_fix(request, workspace, runner, opener, progress.on_event, cancel)
            applied = None
            if result.status == "green" and not dry_run:
                cancel.raise_if_cancelled()
                applied = result.trajectory.stem if result.trajectory else "run"
                checkpoints.begin(applied, workspace)
                checkpoints.apply(applied, result.changes)
    except UserError as error:
        if as_json:
            click.echo(json.dumps({"status": "error", "message": str(error)}))
        raise
    except Cancelled:
        if as_json:
            click.echo(json.dumps({"status": "cancelled"}))
        raise
    if as_json:
        click.echo(json.dumps(summary(result, applied)))
    else:
        _show(result, applied, dry_run=dry_run)
    return ExitCode.OK if result.status in ("green", "nothing_failing") else ExitCode.NOT_GREEN


def summary(result: FixResult, applied: str | None = None) -> dict[str, Any]:
    """The object that `--json` prints."""
    usage = result.usage
    return {
        "status": result.status,
        "fixed": list(result.fixed),
        "still_failing": list(result.still_failing),
        "broken": list(result.broken),
        "flaky": list(result.flaky),
        "other_failing": list(result.other_failing),
        "diff": printable(result.diff),
        "turns": result.turns,
        "tokens": {
            "prompt": usage.prompt_tokens,
            "cached": usage.cached_tokens,
            "completion": usage.completion_tokens,
            "total": usage.prompt_tokens - usage.cached_tokens + usage.completion_tokens,
        },
        "seconds": round(result.seconds, 3),
        "solved_by": list(result.solved_by),
        "reason": result.reason,
        "run": applied,
        "trajectory": str(result.trajectory) if result.trajectory else None,
    }


class Progress:
    """What happens, on standard error: one line that changes on a terminal, a line an event elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._console: Console | None = None
        self._status: Any = None
        if not quiet:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False, markup=False)

    def __enter__(self) -> Progress:
        if self._console is not None and self._console.is_terminal:
            self._status = self._console.status("running the tests; loading the model")
            self._status.start()
        elif self._console is not None:
            self._console.print("running the tests; loading the model")
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def on_event(self, event: Event) -> None:
        """Show one event of the run."""
        from lsp_agent.agent import events

        if self._console is None:
            return
        if isinstance(event, events.BaselineDone):
            self._line(f"{len(event.failing)} of {event.tests} tests fail ({event.seconds:.1f} s)")
        elif isinstance(event, events.ModelReady):
            self._line(f"{event.name} is ready (loaded in {event.seconds:.1f} s)")
        elif isinstance(event, events.TargetStarted):
            self._line(f"{event.nodeid}: suspecting {', '.join(event.suspects[:3]) or 'nothing'}")
        elif isinstance(event, events.Trying):
            spent = f"turn {event.turn}, {event.tokens} tokens, {event.seconds:.0f} s"
            self._line(f"  {event.stage} at {event.where} ({spent})", passing=True)
        elif isinstance(event, events.CandidateJudged):
            if not event.verdict.startswith("refused"):
                self._line(f"  {event.stage} at {event.where}: {event.verdict}", passing=event.verdict == "fails")
        elif isinstance(event, events.TargetSolved):
            self._line(f"{', '.join(event.fixed[:NAMES_SHOWN])} now {'passes' if len(event.fixed) == 1 else 'pass'}")
        elif isinstance(event, events.Verifying):
            self._line("proving it: all tests on a fresh copy")

    def _line(self, text: str, *, passing: bool = False) -> None:
        """Print a line; a `passing` one only replaces the status line of a terminal."""
        assert self._console is not None
        if self._status is None:
            self._console.print(text, soft_wrap=True)
        elif passing:
            self._status.update(text)
        else:
            self._console.print(text, soft_wrap=True)


@contextmanager
def interruptible(cancel: CancelToken) -> Iterator[None]:
    """Ctrl-C and SIGTERM cancel; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if cancel.cancelled:
            raise KeyboardInterrupt
        cancel.cancel()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(result: FixResult, applied: str | None, *, dry_run: bool) -> None:
    spent = f"{result.turns} turn{'' if result.turns == 1 else 's'}, {result.seconds:.1f} s, "
    spent += f"{result.usage.prompt_tokens - result.usage.cached_tokens} tokens read, "
    spent += f"{result.usage.completion_tokens} written"
    if result.status == "nothing_failing":
        click.echo("Nothing to fix: the tests pass.")
        _list("Failing, but not asked for", result.other_failing)
        return
    if result.status == "flaky":
        click.echo("Nothing was changed: these tests failed once and passed on the same code.")
        _list("Flaky", result.flaky)
        return
    if result.best:
        _diff(printable(result.diff))
    if result.status == "green":
        _list("Failed before, pass now", result.fixed)
    else:
        click.echo(f"Not green: your files are untouched. {result.reason}".strip())
        _list("Would pass with the diff above", result.fixed)
        _list("Would get worse with it", result.broken)
        _list("Still failing", result.still_failing)
    _list("Flaky, not claimed", result.flaky)
    _list("Failing as before, not asked for", result.other_failing)
    click.echo(f"Spent: {spent}.")
    if applied is not None:
        click.echo(f"Applied. `lsp-agent undo {applied}` takes it back.")
    elif result.status == "green" and dry_run:
        click.echo("Dry run: no file was changed.")
    if result.trajectory is not None:
        click.echo(f"Record of the run: {result.trajectory}")


def _list(title: str, names: tuple[str, ...]) -> None:
    if names:
        click.echo(f"{title}:")
        for name in names[:NAMES_SHOWN]:
            click.echo(f"  {printable(name)}")
        if len(names) > NAMES_SHOWN:
            click.echo(f"  and {len(names) - NAMES_SHOWN} more")


def _diff(text: str) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.syntax import Syntax

        Console().print(Syntax(text, "diff", background_color="default"))
    else:
        click.echo(text, nl=not text.endswith("\n"))
