"""Progress of long work on the console, and sizes in words."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_STEPS = 4
PLAIN_SECONDS = 60.0
SURE_SECONDS = 5.0
"""Before, nothing is said about the time left."""


class ConsoleProgress:
    """Implements `lsp_agent.models.download.Progress`: bars on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[amount]}"),
        )
        self._bars = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
        self._live = self._console.is_terminal
        self._task: TaskID | None = None
        self._what = ""
        self._total = 0
        self._shown = 0
        self._first: tuple[float, int] | None = None
        self._said = (0.0, 0)

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bars.stop()

    def say(self, sentence: str) -> None:
        """Show one sentence."""
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def start(self, what: str, total: int) -> None:
        """Begin a step of `total` units."""
        self._what, self._total, self._shown, self._first = what, total, 0, None
        if not self._live:
            self.say(f"{what} …")
            return
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(what, total=total or None, amount="")

    def update(self, done: int) -> None:
        """Set how many units of the current step are done."""
        if self._live and self._task is not None:
            amount = f"{done / 1e6:.0f}/{self._total / 1e6:.0f} MB" if self._total > 1_000_000 else ""
            self._bars.update(self._task, completed=done, amount=amount)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = self._said = now, done
        step = done * PLAIN_STEPS // self._total if self._total else 0
        if step > self._shown or now - self._said[0] > PLAIN_SECONDS:
            self._shown, self._said = step, (now, done)
            self.say(f"{self._what}: {100 * done // self._total} %{self._left(now, done)}")

    def _left(self, now: float, done: int) -> str:
        assert self._first is not None
        begin, before = self._first
        if done <= before or now - begin < SURE_SECONDS or done >= self._total:
            return ""
        seconds = (self._total - done) * (now - begin) / (done - before)
        return f", about {seconds / 60:.0f} minutes left" if seconds > 90 else f", about {seconds:.0f} s left"


def experts_beside(prepacked_bytes: int) -> str:
    """What a mixture's experts take beside its package, to follow the package's size; nothing for other models."""
    packed = f", and {gigabytes(prepacked_bytes)} more for its experts once it has run on a CPU"
    return packed if prepacked_bytes else ""


def gigabytes(count: int | None) -> str:
    """A size in GB; `?` for an unknown one."""
    return f"{count / 1e9:.1f} GB" if count else "?"
