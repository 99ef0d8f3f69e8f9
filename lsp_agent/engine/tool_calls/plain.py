"""Answers of models that make no tool calls: everything is text."""

from __future__ import annotations

from lsp_agent.engine.tool_calls.parser import ToolCallParser
from lsp_agent.engine.tool_calls.reader import Reader, View


class PlainParser(ToolCallParser):
    """Passes text through."""

    def _find(self, view: View, at: int, blank_line: bool) -> tuple[int, Reader | None]:  # noqa: ARG002
        return view.end, None
