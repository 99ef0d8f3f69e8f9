"""The language server's wiring: which message goes to which part. The parts hold the logic."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from lsprotocol import types
from pygls.capabilities import ServerCapabilitiesBuilder
from pygls.lsp.server import LanguageServer
from pygls.protocol import default_converter

from lsp_agent import __version__
from lsp_agent.errors import UserError
from lsp_agent.lsp import code_actions, commands
from lsp_agent.lsp.capabilities import ClientFeatures
from lsp_agent.lsp.code_actions import KINDS, Situation, enclosing_test, list_actions
from lsp_agent.lsp.convert import path_of
from lsp_agent.lsp.documents import Documents, relative_path, unsaved
from lsp_agent.lsp.editor import Editor
from lsp_agent.lsp.folder import Folder, Folders
from lsp_agent.lsp.models import Models
from lsp_agent.lsp.parent import watch_editor
from lsp_agent.lsp.protocol import Protocol
from lsp_agent.lsp.watch import Watch

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
"""How long jobs may take to end, with their children, when the server leaves."""
SECTIONS = ("lspAgent", "lsp-agent")
"""Names of our part of an editor's settings."""


class AgentServer(LanguageServer):
    """The server of one editor window."""

    def __init__(self, model: str | None = None) -> None:
        super().__init__("lsp-agent", __version__, protocol_cls=Protocol, converter_factory=default_converter)
        self.documents = Documents()
        self.editor = Editor(self)
        self.folders = Folders()
        self.models = Models()
        self.options: dict[str, Any] = {}
        self.exit_code = 1
        self._model = model
        self._initial: dict[str, Any] = {}
        self._watches: dict[str, Watch] = {}
        self._closed = False

    def initialize_options(self, given: object) -> None:
        """Take the initialization options, which are all ours, whether or not they lie in a section."""
        section = _section(given)
        self._initial = _not_null(as_mapping(given) if section is None else section)
        self._set_options({})

    def change_options(self, given: object) -> None:
        """Take our section of the editor's settings, over the initialization options; the others' is not ours."""
        section = _section(given)
        if section is not None:
            self._set_options(_not_null(section))

    def _set_options(self, changed: Mapping[str, Any]) -> None:
        # `--model` on the command line wins over the editor.
        model = {"model": self._model} if self._model is not None else {}
        self.options = {**self._initial, **changed, **model}

    def add_folder(self, uri: str) -> None:
        """Serve a workspace folder: recover what a crash left, read its settings, watch its files."""
        root = path_of(uri)
        if root is None or not root.is_dir() or self.folders.get(uri) is not None:
            return
        folder = Folder(uri, root, self.documents, self.editor, self.models, self.options)
        self.folders.add(folder)
        watch = Watch(folder)
        self._watches[uri] = watch
        threading.Thread(target=_open_folder, args=(folder, watch), name=f"open {root.name}", daemon=True).start()

    def remove_folder(self, uri: str) -> threading.Thread | None:
        """Stop serving a folder; its job is cancelled."""
        folder = self.folders.remove(uri)
        watch = self._watches.pop(uri, None)
        if watch is not None:
            watch.close()
        return folder.close() if folder is not None else None

    def close(self) -> None:
        """Cancel all jobs, wait a moment for them to end, and close the model; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        threads = [self.remove_folder(folder.uri) for folder in self.folders]
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in threads:
            if thread is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        self.models.close()

    def leave(self, code: int = 1) -> None:
        """Close and end the process at once: the reader's thread may be in a read that nothing interrupts."""
        self.close()
        os._exit(code)

    def closed(self, uri: str) -> None:
        """A document was closed: from now on its file counts, which may be another text than the tests ran on."""
        document = self.documents.get(uri)
        self.documents.close(uri)
        if document is not None and document.path is not None and unsaved({uri: document}):
            self.saved(uri)

    def saved(self, uri: str) -> None:
        """A document was saved in the editor; the watcher may not see it on every file system."""
        folder = self.folders.of(path_of(uri))
        watch = self._watches.get(folder.uri) if folder is not None else None
        if folder is not None and watch is not None:
            path = relative_path(path_of(uri), folder.root)
            watch.changed({path} if path is not None else set())

    def report_server_error(self, error: Exception, source: type[Exception]) -> None:
        """Log the kind of an error only: messages of protocol errors quote what the client sent."""
        log.error("%s while handling a message (%s)", type(error).__name__, source.__name__)


def _open_folder(folder: Folder, watch: Watch) -> None:
    from lsp_agent.lsp.opening import open_folder  # with all that it imports, which the first answer need not wait for

    open_folder(folder, watch)


def as_mapping(value: object) -> Mapping[str, Any]:
    """A JSON object as pygls hands it over: a dict or, in untyped places, a named tuple."""
    if isinstance(value, Mapping):
        return value
    fields = getattr(value, "_asdict", None)
    return fields() if fields is not None else {}


def _section(given: object) -> Mapping[str, Any] | None:
    """Our section of an editor's settings; None when it has none that is an object."""
    settings = as_mapping(given)
    for name in SECTIONS:
        section = settings.get(name)
        if isinstance(section, Mapping):
            return section
    return None


def _not_null(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are null, which is how editors say "not set"."""
    return {name: value for name, value in settings.items() if value is not None}


def create_server(model: str | None = None) -> AgentServer:
    """A server with all features registered, not started; `model` overrides the settings'."""
    server = AgentServer(model)
    _register_lifecycle(server)
    _register_code_actions(server)
    _register_commands(server)
    return server


def _register_lifecycle(server: AgentServer) -> None:
    @server.feature(types.INITIALIZE)
    def initialize(params: types.InitializeParams) -> None:
        server.editor.connect(asyncio.get_running_loop())
        server.editor.features = ClientFeatures.of(params.capabilities)
        server.documents.encoding = ServerCapabilitiesBuilder.choose_position_encoding(params.capabilities)
        server.initialize_options(params.initialization_options)

    @server.feature(types.INITIALIZED)
    def initialized(_params: types.InitializedParams) -> None:
        uris = [folder.uri for folder in server.workspace.folders.values()]
        watch_editor(server.process_id, server.leave)
        for uri in uris or ([server.workspace.root_uri] if server.workspace.root_uri else []):
            server.add_folder(uri)

    @server.feature(types.SHUTDOWN)
    async def shutdown(_params: None) -> None:
        await asyncio.to_thread(server.close)

    @server.feature(types.WORKSPACE_DID_CHANGE_WORKSPACE_FOLDERS)
    def folders_changed(params: types.DidChangeWorkspaceFoldersParams) -> None:
        for removed in params.event.removed:
            server.remove_folder(removed.uri)
        for added in params.event.added:
            server.add_folder(added.uri)

    @server.feature(types.WORKSPACE_DID_CHANGE_CONFIGURATION)
    def configuration_changed(params: types.DidChangeConfigurationParams) -> None:
        server.change_options(params.settings)
        for folder in server.folders:
            folder.reload_settings(server.options)

    @server.feature(types.TEXT_DOCUMENT_DID_SAVE)
    def saved(params: types.DidSaveTextDocumentParams) -> None:
        server.saved(params.text_document.uri)

    @server.feature(types.WINDOW_WORK_DONE_PROGRESS_CANCEL)
    def progress_cancelled(params: types.WorkDoneProgressCancelParams) -> None:
        for folder in server.folders:
            job = folder.slot.current
            if job is not None and job.progress.token == params.token:
                job.cancel.cancel()


def _register_code_actions(server: AgentServer) -> None:
    options = types.CodeActionOptions(code_action_kinds=list(KINDS.values()))

    @server.feature(types.TEXT_DOCUMENT_CODE_ACTION, options)
    def code_action(params: types.CodeActionParams) -> list[types.CodeAction | types.Command]:
        uri = params.text_document.uri
        path = path_of(uri)
        folder = server.folders.of(path)
        if folder is None:
            return list_actions(params, Situation(server.editor.features), [], None)
        job, any_job = folder.slot.busy, folder.slot.current
        situation = Situation(
            server.editor.features,
            folder.uri,
            folder.results,
            running=job.title if job is not None else None,
            stoppable=any_job.title if any_job is not None else None,
            model_problem=folder.model_problem(),
            undo_problem=folder.undo_problem,
        )
        touching = [d for d in folder.shown(uri) if _touch(d.range, params.range)]
        document = server.documents.get(uri)
        names = enclosing_test(document.text, params.range.start.line) if document is not None else None
        relative = relative_path(path, folder.root)
        test = (relative, names) if relative is not None and names is not None else None
        return list_actions(params, situation, touching, test)


def _touch(one: types.Range, other: types.Range) -> bool:
    """Whether two ranges share a line: a quick fix is wanted anywhere on the line that failed."""
    return one.start.line <= other.end.line and other.start.line <= one.end.line


def _register_commands(server: AgentServer) -> None:
    handlers: dict[str, Callable[[Folder, Mapping[str, Any]], None]] = {
        code_actions.FIX_TEST: commands.fix_test,
        code_actions.MAKE_GREEN: commands.make_green,
        code_actions.RUN_TESTS: commands.run_tests,
        code_actions.UNDO: commands.undo,
        code_actions.STOP: commands.stop,
    }

    def register(name: str, handler: Callable[[Folder, Mapping[str, Any]], None]) -> None:
        @server.command(name)
        def command(*arguments: Any) -> None:
            """Start the job and answer at once; what goes wrong is shown, not returned."""
            given = as_mapping(arguments[0]) if arguments else {}
            try:
                uri = given.get("folder")
                folder = server.folders.get(uri) if isinstance(uri, str) else server.folders.only()
                if folder is None:
                    raise UserError("This folder is no longer part of the workspace.")
                handler(folder, given)
            except UserError as error:
                server.editor.show(str(error), types.MessageType.Error)

    for name, handler in handlers.items():
        register(name, handler)
