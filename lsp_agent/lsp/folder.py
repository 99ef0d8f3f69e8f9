"""One workspace folder: its settings, its job, its test results and what the editor shows of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsprotocol import types

from lsp_agent.errors import ExitCode, UserError
from lsp_agent.lsp.diagnostics import Publisher, build
from lsp_agent.lsp.documents import Document, Documents, relative_path, unsaved, versions
from lsp_agent.lsp.editor import Editor
from lsp_agent.lsp.jobs import JobSlot
from lsp_agent.lsp.models import Models
from lsp_agent.lsp.results import Results
from lsp_agent.testing.integrity import ProtectedFiles
from lsp_agent.testing.pytest_runner import PytestRunner
from lsp_agent.testing.sandbox import Sandbox
from lsp_agent.workspace.workspace import Workspace

if TYPE_CHECKING:
    from lsp_agent.config import Settings
    from lsp_agent.workspace.checkpoints import Checkpoints


class Folder:
    """The state of one workspace folder; `results` changes only through `update`."""

    def __init__(
        self,
        uri: str,
        root: Path,
        documents: Documents,
        editor: Editor,
        models: Models,
        options: Mapping[str, Any],
    ) -> None:
        self.uri = uri
        self.root = root
        self.documents = documents
        self.editor = editor
        self.models = models
        self.slot = JobSlot(editor)
        self.results = Results()
        self.undo_problem: str | None = None
        """Why there is nothing to undo, as far as is known; `check_undo` finds out."""
        self.fixed_by: dict[str, tuple[str, ...]] = {}
        """The tests that each run of this session fixed."""
        self._options = options
        self._settings: Settings | None = None
        self._checkpoints: Checkpoints | None = None
        self._publisher = Publisher(editor)
        self._warned = False
        """Whether the user was told that tests run without the sandbox."""
        self._lock = threading.RLock()

    # settings -----------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The folder's settings, read when first asked for. Raises `UserError` when they are not usable."""
        from lsp_agent.config import load_settings  # pydantic takes a while to import; not before `initialize` answers

        with self._lock:
            settings = self._settings
            if settings is None:
                settings = self._settings = load_settings(self.root, self._options)
            return settings

    def reload_settings(self, options: Mapping[str, Any] | None = None) -> None:
        """Forget the settings, so that the next job reads them again; with `options` in place of the editor's."""
        if options is not None:
            self._options = options
        self._settings = None  # without the lock, which may be held for a while: the event loop calls this

    def model_problem(self) -> str | None:
        """Why no model can be opened here, from what is known without waiting."""
        settings = self._settings
        return self.models.problem(settings.model, settings.backend) if settings is not None else None

    # what jobs work with ------------------------------------------------------------------------------------------

    def open_documents(self) -> dict[str, Document]:
        """The open documents of this folder, by relative path, as they are now."""
        return self.documents.under(self.root)

    def workspace(self, documents: Mapping[str, Document]) -> Workspace:
        """The folder's files with the unsaved ones of `documents` in front."""
        return Workspace(self.root, unsaved(documents))

    def runner(self) -> PytestRunner:
        """A runner for one job: it reads the project's test configuration as it is now."""
        settings = self.settings
        sandbox = Sandbox(self.root, enabled=settings.sandbox)
        if sandbox.level != "full":
            self._warn_of(sandbox.reason)
        return PytestRunner(
            self.root, interpreter=settings.interpreter, pytest_args=settings.pytest_args, sandbox=sandbox
        )

    def _warn_of(self, reason: str) -> None:
        """Say once that the tests, which may be anybody's code, run unprotected."""
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            self.editor.show(f"{self.root.name}: {reason}", types.MessageType.Warning)

    @property
    def checkpoints(self) -> Checkpoints:
        """The folder's journal of applied runs."""
        from lsp_agent.workspace.checkpoints import Checkpoints

        with self._lock:
            if self._checkpoints is None:
                self._checkpoints = Checkpoints(self.root, protected=ProtectedFiles(self.root))
            return self._checkpoints

    def check_undo(self) -> None:
        """Find out whether there is a run to undo; blocks, so not on the event loop."""
        try:
            self.checkpoints.plan_undo(overlay=unsaved(self.open_documents()))
            self.undo_problem = None
        except UserError as error:
            # A conflict may be gone by the time the action is chosen; only an empty history disables it.
            self.undo_problem = str(error) if error.exit_code is ExitCode.ENVIRONMENT else None

    # results ------------------------------------------------------------------------------------------------------

    def update(self, change: Callable[[Results], Results]) -> None:
        """Replace the results by what `change` makes of them, and show the difference."""
        with self._lock:
            self.results = change(self.results)
            self._publish()

    def shown(self, uri: str) -> list[types.Diagnostic]:
        """Our diagnostics of a document as they were last published."""
        return self._publisher.published.get(uri, [])

    def _publish(self) -> None:
        documents = self.open_documents()
        protected = ProtectedFiles(self.root)
        diagnostics = build(
            self.results,
            self.root,
            documents,
            lambda path: path in protected,
            self.editor.features,
            self.documents.encoding,
        )
        self._publisher.publish(diagnostics, versions(documents.values()))

    def close(self) -> threading.Thread | None:
        """Cancel the job and clear the diagnostics; returns the job's thread to wait for."""
        thread = self.slot.close()
        with self._lock:
            self._publisher.publish({}, {})
        return thread


class Folders:
    """The workspace folders of one window; changed by the event loop only."""

    def __init__(self) -> None:
        self._folders: dict[str, Folder] = {}

    def __iter__(self) -> Any:
        return iter(list(self._folders.values()))

    def add(self, folder: Folder) -> None:
        """Add a folder under its URI."""
        self._folders[folder.uri] = folder

    def remove(self, uri: str) -> Folder | None:
        """Take a folder out and return it."""
        return self._folders.pop(uri, None)

    def get(self, uri: str) -> Folder | None:
        """The folder with this URI."""
        return self._folders.get(uri)

    def of(self, path: Path | None) -> Folder | None:
        """The innermost folder that holds `path`."""
        holding = [f for f in self._folders.values() if path is not None and _holds(f.root, path)]
        return max(holding, key=lambda f: len(f.root.parts), default=None)

    def only(self) -> Folder:
        """The one folder there is. Raises `UserError` when there is none, or more than one."""
        folders = list(self._folders.values())
        if len(folders) != 1:
            which = "Open the project's folder first" if not folders else "Say which folder: several are open"
            raise UserError(f"{which}, because tests run in a workspace folder.")
        return folders[0]


def _holds(root: Path, path: Path) -> bool:
    return path == root or path.is_relative_to(root) or relative_path(path, root) is not None
