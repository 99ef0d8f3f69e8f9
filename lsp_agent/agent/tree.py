"""The state of the user's tree as the agent changes it: original files, and the texts of those that differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lsp_agent.agent.source import Source
from lsp_agent.errors import UserError
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.files import read_or_none, resolve_inside
from lsp_agent.workspace.scratch import ScratchTree


@dataclass
class Originals:
    """Files as they were when the run began: read from the scratch copy, since the user may edit meanwhile."""

    scratch: ScratchTree
    _contents: dict[str, bytes | None] = field(default_factory=dict)

    def content(self, path: str) -> bytes | None:
        """Bytes of a file; None when it cannot be read or leads out of the root."""
        if path not in self._contents:
            self.scratch.reset()
            try:
                self._contents[path] = read_or_none(resolve_inside(self.scratch.path, path))
            except (OSError, UserError):
                self._contents[path] = None
        return self._contents[path]

    def source(self, path: str) -> Source | None:
        """A file as text; None when it is not."""
        content = self.content(path)
        return None if content is None else Source.decode(path, content)

    def changes(self, texts: Mapping[str, str]) -> tuple[FileChange, ...] | None:
        """The file changes that give `texts`; None when a file's encoding cannot hold its text."""
        changes = []
        for path, text in sorted(texts.items()):
            source, before = self.source(path), self.content(path)
            if source is None:
                return None
            after = source.encode(text)
            if after is None:
                return None
            if after != before:
                changes.append(FileChange(path, before, after))
        return tuple(changes)
