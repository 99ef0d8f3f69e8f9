"""Progress reports: throttled, but what is being done now is always said."""

from __future__ import annotations

import time
from typing import Any

from lsprotocol import types

from lsp_agent.lsp.progress import MIN_INTERVAL_S, Progress


class FakeEditor:
    """Records what the editor would get."""

    def __init__(self, *, has_progress: bool) -> None:
        self.sent: list[Any] = []
        self.has_progress = has_progress

    def create_progress(self, _token: str) -> bool:
        return self.has_progress

    def progress(self, _token: str, value: Any) -> None:
        self.sent.append(value)

    def show(self, text: str, *_: object) -> None:
        self.sent.append(f"shown: {text}")

    def log(self, text: str, *_: object) -> None:
        self.sent.append(f"logged: {text}")


def test_a_burst_becomes_two_reports_and_the_last_one_is_said() -> None:
    editor = FakeEditor(has_progress=True)
    progress = Progress(editor, "Fix")  # type: ignore[arg-type]
    progress.begin()
    for number in range(50):
        progress.report(f"turn {number}", number)
    time.sleep(3 * MIN_INTERVAL_S)
    reports = [v for v in editor.sent if isinstance(v, types.WorkDoneProgressReport)]
    assert [r.message for r in reports] == ["turn 0", "turn 49"]
    progress.report("turn 50", 20)
    progress.end("done")
    progress.end("done")
    progress.report("too late")
    time.sleep(3 * MIN_INTERVAL_S)
    assert [type(v).__name__ for v in editor.sent[3:]] == ["WorkDoneProgressReport", "WorkDoneProgressEnd"]
    assert editor.sent[3].percentage == 49


def test_without_a_progress_bar_the_start_is_shown_and_the_rest_logged() -> None:
    editor = FakeEditor(has_progress=False)
    progress = Progress(editor, "Fix")  # type: ignore[arg-type]
    progress.begin()
    progress.report("turn 1")
    progress.end("done")
    assert editor.sent == ["shown: Fix …", "logged: Fix: turn 1"]


def test_a_background_job_without_a_bar_is_quiet() -> None:
    editor = FakeEditor(has_progress=False)
    progress = Progress(editor, "Fix", quiet=True)  # type: ignore[arg-type]
    progress.begin()
    progress.report("turn 1")
    progress.end("done")
    assert editor.sent == []
