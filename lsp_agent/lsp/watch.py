"""Keeps results honest when files change, in the editor or outside: what failed last runs again, or is forgotten."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lsp_agent.errors import UserError
from lsp_agent.lsp.folder import Folder

if TYPE_CHECKING:
    from lsp_agent.workspace.watcher import Watcher

RETRY_S = 0.5
"""While a job runs, how often to look whether it has ended."""
CHEAP_S = 30.0
"""Failing tests that took longer together are not run again unasked; their results are forgotten instead."""


class Watch:
    """Watches one folder. `changed` may be called from any thread."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._watcher: Watcher | None = None
        self._timer: threading.Timer | None = None
        self._paths: set[str] = set()
        self._closed = threading.Event()

    def start(self) -> None:
        """Begin watching the disk; blocks while the folder is looked through."""
        from lsp_agent.workspace.watcher import Watcher  # watchdog takes a while to import

        watcher = Watcher(self._folder.root, self.changed)
        watcher.start()
        with self._lock:
            self._watcher = watcher
        if self._closed.is_set():
            watcher.stop()

    def close(self) -> None:
        """Stop watching; the watcher's own threads end in the background."""
        with self._lock:
            self._closed.set()
            watcher, timer = self._watcher, self._timer
        if timer is not None:
            timer.cancel()
        if watcher is not None:
            threading.Thread(target=watcher.stop, name="stop watching", daemon=True).start()

    def wait_closed(self, seconds: float) -> bool:
        """Sleep up to `seconds`; True at once when the watch is closed."""
        return self._closed.wait(seconds)

    def changed(self, paths: Iterable[str]) -> None:
        """Files changed: reload the settings if theirs did, and see that results are still true."""
        with self._lock:
            self._paths |= set(paths)
        self._soon(0.0)

    def _soon(self, seconds: float) -> None:
        with self._lock:
            if self._closed.is_set() or (self._timer is not None and self._timer.is_alive() and seconds > 0):
                return
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(seconds, self._check)
            self._timer.daemon = True
            self._timer.start()

    def _check(self) -> None:
        from lsp_agent.config import FILE_NAME

        folder = self._folder
        with self._lock:
            paths, self._paths = self._paths, set()
        if FILE_NAME in paths:
            folder.reload_settings()
        results = folder.results
        if not results.ran:
            return
        try:
            policy = folder.settings.run_tests_on_save
        except UserError:
            policy = "off"
        cost = sum(results.tests[nodeid].seconds for nodeid in results.failing)
        if policy == "failing" and not results.failing:
            return
        if policy == "off" or (policy == "failing" and cost > CHEAP_S):
            if results.failing and folder.slot.busy is None:
                folder.update(lambda known: known.without(known.failing))
                folder.editor.log("Files changed, so the results of the failing tests were removed.")
            return
        from lsp_agent.lsp.tests_job import run_again

        nodeids = results.failing if policy == "failing" else ()
        title = "Run the failing tests again" if nodeids else "Run the tests again"
        if folder.slot.start(title, lambda job: run_again(folder, job, nodeids), background=True) is None:
            # Another job has the place; a run of tests that has begun may not have seen the change.
            with self._lock:
                self._timer = None
            self._soon(RETRY_S)
