"""Watch the workspace for changes made outside of the editor."""

from __future__ import annotations

import errno
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from watchdog.events import (
    EVENT_TYPE_CLOSED,
    EVENT_TYPE_CREATED,
    EVENT_TYPE_DELETED,
    EVENT_TYPE_MODIFIED,
    EVENT_TYPE_MOVED,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver
from watchdog.observers.polling import PollingObserverVFS

from lsp_agent.workspace.ignore import JUNK, IgnoreRules
from lsp_agent.workspace.workspace import Workspace

logger = logging.getLogger(__name__)

_CHANGES = {EVENT_TYPE_CLOSED, EVENT_TYPE_CREATED, EVENT_TYPE_DELETED, EVENT_TYPE_MODIFIED, EVENT_TYPE_MOVED}
_MAX_DELAY_S = 2.0
"""A steady stream of events is reported at least this often."""
_ROOT_CHECK_S = 1.0
_POLL_S = 2.0
# Too many watches, too many observers, too little memory for them.
_LIMITS = {errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Watcher(FileSystemEventHandler):
    """Call `on_change` with the set of changed relative posix paths, `debounce_s` after the last event.

    Ignored files are left out; files, not folders, are reported, deleted ones too. The callback runs in a thread of
    the watcher; what it raises is logged. When the root disappears its files are reported once, and again when it
    comes back. Falls back to polling, with a warning, where the system's limit on watches is reached.
    """

    def __init__(self, root: Path, on_change: Callable[[set[str]], None], *, debounce_s: float = 0.3) -> None:
        self._root = Path(root).resolve()
        self._on_change = on_change
        self._debounce_s = debounce_s
        self._observer: BaseObserver | None = None
        self._polling = False
        self._condition = threading.Condition()
        self._paths: set[str] = set()
        self._first = self._last = 0.0
        self._stopping = False
        self._root_identity: tuple[int, int] | None = None
        self._known: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="workspace-watcher", daemon=True)

    def start(self) -> None:
        """Begin watching; events from here on are reported."""
        self._observe()
        self._thread.start()

    def stop(self) -> None:
        """Stop and wait for the threads; pending events are dropped. May be called again, not from `on_change`."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._unobserve()

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Note an event of the observer's thread."""
        if event.event_type not in _CHANGES or (event.is_directory and event.event_type == EVENT_TYPE_MODIFIED):
            return
        paths = {self._relative(place) for place in (event.src_path, event.dest_path) if place}
        noted = {path for path in paths if path is not None and JUNK.isdisjoint(path.split("/"))}
        if noted:
            self._note(noted)

    def _note(self, paths: set[str]) -> None:
        with self._condition:
            self._last = time.monotonic()
            if not self._paths:
                self._first = self._last
            self._paths |= paths
            self._condition.notify_all()

    def _relative(self, place: bytes | str) -> str | None:
        try:
            path = Path(os.fsdecode(place)).relative_to(self._root).as_posix()
        except ValueError:
            return None
        return None if path == "." else path

    def _run(self) -> None:
        while True:
            with self._condition:
                if not self._paths and not self._stopping:
                    self._condition.wait(_ROOT_CHECK_S)
                if self._stopping:
                    return
                paths = self._due()
            if paths:
                self._report(paths)
            self._follow_root()

    def _due(self) -> set[str]:
        """Wait until the events have settled; the paths, or none if there are none or the watcher stops."""
        while self._paths and not self._stopping:
            settled = min(self._last + self._debounce_s, self._first + _MAX_DELAY_S)
            left = settled - time.monotonic()
            if left <= 0:
                paths, self._paths = self._paths, set()
                return paths
            self._condition.wait(left)
        return set()

    def _report(self, paths: set[str]) -> None:
        try:
            folders = {path for path in paths if self._is_folder(path) or self._held_files(path)}
            if folders:
                self._keep_within_limit()
                # A folder that was moved in, or moved away, stands for the files in it.
                files = set(Workspace(self._root).files()) if self._root.is_dir() else set()
                below = tuple(f"{path}/" for path in folders)
                paths = paths - folders | {path for path in files | self._known if path.startswith(below)}
                self._known = files
            if self._root.is_dir():
                paths = paths - IgnoreRules(self._root).ignored(paths)
            present = {path for path in paths if os.path.lexists(self._root / path)}
            self._known = (self._known - paths) | present
            if paths:
                self._on_change(paths)
        except Exception:
            logger.exception("Changes of files could not be reported")

    def _keep_within_limit(self) -> None:
        """New folders need new watches: where there are none left, poll."""
        try:
            self._probe_limit()
        except OSError as error:
            if error.errno in _LIMITS:
                self._unobserve()
                self._poll()

    def _is_folder(self, path: str) -> bool:
        return (self._root / path).is_dir() and not (self._root / path).is_symlink()

    def _held_files(self, path: str) -> bool:
        return any(known.startswith(f"{path}/") for known in self._known)

    def _follow_root(self) -> None:
        """Notice that the root is gone, or is another folder than the one watched, and watch what is there now."""
        identity = _identity(self._root)
        if identity == self._root_identity:
            return
        self._unobserve()
        if identity is None:
            self._root_identity = None
            gone, self._known = self._known, set()
        else:
            gone = self._known
            self._observe()
        if gone | self._known:
            self._report_root(gone | self._known)

    def _report_root(self, paths: set[str]) -> None:
        try:
            self._on_change(paths)
        except Exception:
            logger.exception("Changes of files could not be reported")

    def _observe(self) -> None:
        self._root_identity = _identity(self._root)
        if self._root_identity is None:
            return
        try:
            self._begin(Observer())
            self._probe_limit()
        except OSError as error:
            self._unobserve()
            if error.errno == errno.ENOENT:
                self._root_identity = None
                return
            if error.errno not in _LIMITS:
                raise
            self._poll()
        self._known = set(Workspace(self._root).files()) if self._root.is_dir() else set()

    def _begin(self, observer: BaseObserver) -> None:
        observer.schedule(self, str(self._root), recursive=True)
        try:
            observer.start()
        except BaseException:
            observer.unschedule_all()
            raise
        self._observer = observer

    def _probe_limit(self) -> None:
        """Raise `OSError` if no further folder can be watched: watchdog silently leaves out what is beyond."""
        if self._observer is None or self._polling:
            return
        with tempfile.TemporaryDirectory(prefix="lsp-agent-watch-") as folder:
            self._observer.unschedule(self._observer.schedule(FileSystemEventHandler(), folder))

    def _poll(self) -> None:
        logger.warning(
            "The system allows no more file watches, so %s is looked through every %g s instead: raise "
            "fs.inotify.max_user_watches and fs.inotify.max_user_instances.",
            self._root,
            _POLL_S,
        )
        self._begin(PollingObserverVFS(stat=os.lstat, listdir=_list_without_junk, polling_interval=_POLL_S))
        self._polling = True

    def _unobserve(self) -> None:
        observer, self._observer = self._observer, None
        self._polling = False
        if observer is not None:
            observer.stop()
            observer.join()


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None


def _list_without_junk(folder: str | None) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder or ".") as entries:
        yield from [entry for entry in entries if entry.name not in JUNK]
