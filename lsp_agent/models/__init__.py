"""Models by name: what is known about them, which are installed, and opening one.

`open_model` is all that the rest of the program needs. This module imports nothing heavy, so that the language server
stays light.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatModel

if TYPE_CHECKING:
    from lsp_agent.config import Backend

SCRIPTED = "scripted:"
MAX_CONTEXT = 8192
"""Tokens of context to plan for: the small models' prompts are short, and the key-value cache costs memory."""


def open_model(
    name: str | None = None, cancel: CancelToken | None = None, *, backend: Backend | None = None
) -> ChatModel:
    """Open the model `name` on the user's engine, which is started if need be; returns it loaded.

    None: the model of `backend`, a server that somebody else runs, or the default that `lsp-agent doctor` names.
    `scripted:FILE.json` opens the scripted model of the tests. Raises `UserError` when no such model is installed or
    it cannot be loaded, and `Cancelled`.
    """
    if name is not None and name.startswith(SCRIPTED):
        from lsp_agent.engine.scripted import ScriptedModel

        return ScriptedModel(Path(name.removeprefix(SCRIPTED)))
    if name is None and backend is not None:
        from lsp_agent.engine.remote.backend import open_backend

        return open_backend(backend, cancel)
    from lsp_agent.engine.service.client import EngineModel
    from lsp_agent.models.store import resolve

    installed = resolve(name)
    fim = installed.manifest.fim
    separators = (fim.repo_name, fim.file_sep) if fim and fim.repo_name and fim.file_sep else None
    return EngineModel(
        installed.name,
        installed.path,
        tier=installed.manifest.tier,
        cancel=cancel,
        file_tokens=separators,
        infills=fim is not None,
    )
