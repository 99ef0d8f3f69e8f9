"""`ChatModel` on the user's engine: starts it if it does not run, and asks once more when it dies."""

from __future__ import annotations

import os
import secrets
import threading
from pathlib import Path

import httpx

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Tier
from lsp_agent.engine.gpu.errors import GpuLost
from lsp_agent.engine.remote.connection import Address, Connection, Reply
from lsp_agent.engine.remote.dialect import Dialect
from lsp_agent.engine.remote.openai_model import OpenAiModel
from lsp_agent.engine.service import control_client, launch
from lsp_agent.engine.service.runtime import HAS_UNIX_SOCKETS, About, Place, place
from lsp_agent.errors import EngineStopping, UserError

LOST_GPU_S = 10.0
"""How long an engine whose GPU was lost takes to end, at most."""
DYING_S = 30.0
"""Longer than a process takes to die, also on a busy machine."""
MOST_DEATHS = 2
CLIENT = f"{os.getpid()}-{secrets.token_hex(4)}"
"""This process among the engine's clients, between whom it is fair."""
MOST_STOPS = 5
"""Engines in a row that were just about to leave."""


class EngineEndpoint:
    """The user's engine with one model loaded. Thread-safe."""

    def __init__(self, name: str, package: Path) -> None:
        self.name = name
        self.context_length = 0
        self._package = package
        self._place = place()
        self._lock = threading.Lock()
        """Held while the engine starts or loads: one thread does it for all."""
        self._loaded: About | None = None
        self._headers: dict[str, str] = {}
        self._leaving: About | None = None
        self._asked = threading.local()
        """The engine that the calling thread was sent to last; others may have started another one since."""

    @property
    def place(self) -> Place:
        """Where the engine listens."""
        return self._place

    @property
    def about(self) -> About:
        """The engine that answered last."""
        assert self._loaded is not None
        return self._loaded

    def address(self, cancel: CancelToken) -> Address:
        """See `Endpoint.address`: starts the engine and loads the model if need be."""
        while not self._lock.acquire(timeout=launch.POLL_S):
            cancel.raise_if_cancelled()
        try:
            deaths = 0
            while (about := self._running(cancel)) != self._loaded:
                try:
                    self._load(about, cancel)
                except EngineStopping:
                    self._leaving = about
                except httpx.TransportError as error:
                    deaths += 1
                    if deaths == MOST_DEATHS:
                        raise UserError(f"The engine stops each time it is asked; see {self._place.log}.") from error
            self._asked.about = about
            headers = {**self._headers, "X-LSP-Agent-Client": CLIENT}
        finally:
            self._lock.release()
        socket = self._place.socket if HAS_UNIX_SOCKETS else None
        return Address(f"{control_client.base_url(about)}/v1", socket, headers, direct=True)

    def again(self, failure: httpx.TransportError | Reply, attempt: int) -> bool:
        """See `Endpoint.again`: once if the engine died, and whenever it is about to leave."""
        about: About = self._asked.about
        if not isinstance(failure, Reply):
            # While a killed process is taken down, its socket may still take connections, only to break them.
            if attempt == 0:
                launch.wait_until(
                    lambda: launch.gone(about) or control_client.status(self._place, about) is not None, DYING_S
                )
            return attempt == 0
        if failure.code == EngineStopping.code:
            self._leaving = about
            return attempt < MOST_STOPS
        # A new process may use the GPU, or the CPU where the device was not chosen.
        return (
            failure.code == GpuLost.code and attempt == 0 and launch.wait_until(lambda: launch.gone(about), LOST_GPU_S)
        )

    def explain(self, error: httpx.TransportError) -> UserError:  # noqa: ARG002 - the protocol's
        """See `Endpoint.explain`."""
        return UserError(f"The engine stopped while it answered; run again, or see {self._place.log}.")

    def _running(self, cancel: CancelToken) -> About:
        leaving = self._leaving
        while (about := launch.ensure(self._place, cancel)) == leaving:
            launch.wait_until(lambda: launch.gone(leaving), float("inf"), cancel)
        return about

    def _load(self, about: About, cancel: CancelToken) -> None:
        for said in control_client.load(self._place, about, self.name, self._package, cancel):
            if "loaded" in said:
                self.context_length = said["loaded"]["context_length"]
        self._headers = control_client.headers(self._place)
        self._loaded = about


class EngineModel(OpenAiModel):
    """A model on the user's engine, which others use as well. Closing it closes the connection."""

    def __init__(
        self,
        name: str,
        package: Path,
        *,
        tier: Tier,
        cancel: CancelToken | None = None,
        file_tokens: tuple[str, str] | None = None,
        infills: bool = True,
    ) -> None:
        """Waits until the model is loaded. Raises `UserError` when it cannot be, and `Cancelled`.

        `infills`: the model was trained to fill in the middle; that its vocabulary has the tokens says little.
        """
        self.endpoint = EngineEndpoint(name, package)
        self.endpoint.address(cancel or CancelToken())
        super().__init__(
            name,
            Connection(self.endpoint),
            Dialect("lsp-agent"),
            tier=tier,
            context_length=self.endpoint.context_length,
            file_tokens=file_tokens,
            infills=infills,
            where="The engine",
        )
