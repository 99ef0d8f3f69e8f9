"""Candidate edits, cheapest first: what is asked of the model, and how its answer becomes a changed file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lsp_agent.agent.regions import Region
from lsp_agent.chat_model import Message, Sampling


@dataclass(frozen=True)
class Ask:
    """One request to the model. Either `messages` (a chat) or `prefix` and `suffix` (fill in the middle)."""

    stage: str
    region: Region
    line: int
    sampling: Sampling
    build: Callable[[str], str | None]
    """Turns an answer into the whole new text of the region's file; None when the answer cannot be used."""
    n: int = 1
    prefix: str = ""
    suffix: str = ""
    messages: tuple[Message, ...] = ()
    base: Mapping[str, str] = field(default_factory=dict)
    """Changed files, by path, that the answer builds upon beyond the state of the search (a second edit)."""

    @property
    def where(self) -> str:
        """Place, for people."""
        return f"{self.region.path}:{self.line} {self.region.name}"
