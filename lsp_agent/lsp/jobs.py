"""One job at a time for each workspace folder, each in a thread of its own.

The event loop starts and cancels jobs; a job's thread does the work and reports. A background job (tests that run
again because files changed) gives way to one the user asked for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lsprotocol import types

from lsp_agent.cancel import CancelToken
from lsp_agent.errors import Cancelled, UserError
from lsp_agent.lsp.editor import Editor
from lsp_agent.lsp.progress import Progress

log = logging.getLogger(__name__)


@dataclass
class Job:
    """One running job."""

    title: str
    background: bool
    progress: Progress
    cancel: CancelToken = field(default_factory=CancelToken)
    started: float = field(default_factory=time.monotonic)
    thread: threading.Thread | None = None
    touched: bool = False
    """Whether the job may have changed the user's files; until then, stopping it leaves them as they are."""

    @property
    def seconds(self) -> float:
        """Since the job was started."""
        return time.monotonic() - self.started


@dataclass(frozen=True)
class Ending:
    """How a job ended: what the user is told, and what is to run in the background after it."""

    text: str
    kind: types.MessageType = types.MessageType.Info
    then: tuple[str, Work] | None = None
    """Title and work."""


Work = Callable[[Job], Ending]


class JobSlot:
    """The place for one folder's job. `start`, `stop` and `current` may be used from any thread."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._lock = threading.Lock()
        self._current: Job | None = None
        self._closed = False

    @property
    def current(self) -> Job | None:
        """The job that runs now."""
        return self._current

    @property
    def busy(self) -> Job | None:
        """The job that runs now, if it is one the user asked for."""
        job = self._current
        return job if job is not None and not job.background else None

    def start(self, title: str, work: Work, *, background: bool = False) -> Job | None:
        """Start `work` in a thread; None when another job has the place (or the slot was closed)."""
        with self._lock:
            former = self._current
            if self._closed or (former is not None and (background or not former.background)):
                return None
            if former is not None:
                former.cancel.cancel()
            job = Job(title, background, Progress(self._editor, title, quiet=background))
            job.thread = threading.Thread(target=self._run, args=(job, work, former), name=title, daemon=True)
            self._current = job
            job.thread.start()  # under the lock: whoever takes the place next may join it
        return job

    def stop(self) -> bool:
        """Cancel the running job; False when none runs."""
        job = self._current
        if job is None:
            return False
        job.cancel.cancel()
        return True

    def close(self) -> threading.Thread | None:
        """Cancel the running job and accept no other; returns the thread to wait for."""
        with self._lock:
            self._closed = True
        self.stop()
        job = self._current
        return job.thread if job is not None else None

    def _run(self, job: Job, work: Work, former: Job | None) -> None:
        try:
            if former is not None and former.thread is not None:
                former.thread.join()
            job.cancel.raise_if_cancelled()
            job.progress.begin()
            ending = work(job)
        except Cancelled:
            ending = Ending(f"{job.title}: stopped after {job.seconds:.1f} s. {_state(job)}")
        except UserError as error:
            ending = Ending(f"{job.title}: {error}", types.MessageType.Error)
        except Exception as error:
            # A fault of ours. The traceback holds lines of our code only, never of the user's.
            log.exception("The job %r failed", job.title)
            text = f"{job.title} ended with an internal error ({type(error).__name__}). {_state(job)}"
            ending = Ending(text, types.MessageType.Error)
        # The place is free before anybody hears of the end, so that the next job can be started at once.
        with self._lock:
            if self._current is job:
                self._current = None
        job.progress.end(ending.text)
        if job.background:
            self._editor.log(f"{job.title}: {ending.text}", ending.kind)
        else:
            self._editor.show(ending.text, ending.kind)
        if ending.then is not None:
            self.start(*ending.then, background=True)


def _state(job: Job) -> str:
    return "Its changes are made; they can be undone." if job.touched else "Your files are untouched."
