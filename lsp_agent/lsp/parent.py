"""Leave when the editor has died, even if some other process keeps our standard input open."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

POLL_S = 1.0


def watch_editor(pid: int | None, on_death: Callable[[], None]) -> None:
    """Call `on_death` from a thread when the process `pid` is gone.

    Only one of our own ancestors is watched: an editor that runs elsewhere, outside of our container for instance,
    has a process id that means nothing here.
    """
    if pid is not None:
        threading.Thread(target=_watch, args=(pid, on_death), name="watch the editor", daemon=True).start()


def _watch(pid: int, on_death: Callable[[], None]) -> None:
    import psutil

    try:
        editor = next((p for p in psutil.Process().parents() if p.pid == pid), None)
    except psutil.Error:
        return
    if editor is None:
        return
    while editor.is_running() and editor.status() != psutil.STATUS_ZOMBIE:
        time.sleep(POLL_S)
    on_death()
