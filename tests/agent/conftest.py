"""A small project, a model that answers from a function, and a runner that takes milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from quick_runner import QuickRunner

from lsp_agent.agent.fix import fix
from lsp_agent.agent.request import FixRequest, FixResult, Limits
from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import (
    DEFAULT_OPTIONS,
    ChatOptions,
    Completion,
    Message,
    Sampling,
    Tier,
    TokenScore,
    ToolSchema,
    Usage,
)
from lsp_agent.workspace.workspace import Workspace


@dataclass
class FakeModel:
    """Answers with what `infills` and `chats` return for a prompt; `<FILL>` marks the blank."""

    infills: Callable[[str], str] = lambda prompt: ""
    chats: Callable[[str], str] = lambda prompt: ""
    surprising: str = ""
    """Text whose tokens get a low probability."""
    name: str = "fake"
    tier: Tier = "small"
    context_length: int = 8192
    file_tokens: tuple[str, str] | None = None
    asked: list[str] = field(default_factory=list)
    on_ask: Callable[[CancelToken], None] = lambda cancel: None
    closed: int = 0

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        tools: Sequence[ToolSchema] = (),
        options: ChatOptions = DEFAULT_OPTIONS,
    ) -> list[Completion]:
        return self._answer("\n".join(m["content"] for m in messages), self.chats, cancel, n)

    def infill(
        self,
        prefix: str,
        suffix: str,
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        options: ChatOptions = DEFAULT_OPTIONS,
    ) -> list[Completion]:
        return self._answer(f"{prefix}<FILL>{suffix}", self.infills, cancel, n)

    def _answer(self, prompt: str, answer: Callable[[str], str], cancel: CancelToken, n: int) -> list[Completion]:
        self.asked.append(prompt)
        self.on_ask(cancel)
        cancel.raise_if_cancelled()
        return [Completion(answer(prompt), "stop", Usage(10, 5, 3)) for _ in range(n)]

    def score(self, text: str, cancel: CancelToken) -> list[TokenScore]:
        at = text.rfind(self.surprising) if self.surprising else -1
        return [
            TokenScore(i, i + 1, -9.0 if at <= i < at + len(self.surprising) else -0.1) for i in range(1, len(text))
        ]

    def close(self) -> None:
        self.closed += 1


@dataclass
class Project:
    """A project on disk and what works on it."""

    root: Path
    model: FakeModel
    runner: Any
    events: list[Any] = field(default_factory=list)
    cancel: CancelToken = field(default_factory=CancelToken)

    def write(self, **files: str) -> Project:
        for name, text in files.items():
            path = self.root / name.replace("__", "/").replace("_py", ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return self

    def tree(self) -> dict[str, bytes]:
        return {
            p.relative_to(self.root).as_posix(): p.read_bytes()
            for p in sorted(self.root.rglob("*"))
            if p.is_file() and "__pycache__" not in p.parts
        }

    def fix(self, *nodeids: str, **limits: Any) -> FixResult:
        before = self.tree()
        request = FixRequest(nodeids, limits=Limits(**{"max_seconds": 60, "max_turns": 400, **limits}))
        try:
            return fix(
                request, Workspace(self.root), self.runner, lambda *_: self.model, self.events.append, self.cancel
            )
        finally:
            assert self.model.closed <= 1
            if not getattr(self, "user_edits", False):
                assert self.tree() == before, "the user's tree was touched"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "project"
    root.mkdir()
    return Project(root, FakeModel(), QuickRunner(root))


BUGGY = """def below(values, limit):
    total = 0
    for value in values:
        total += value
        if total == limit:
            return True
    return False
"""
TEST = """from calc import below


def test_below():
    assert below([1, 2], 2) is True
    assert below([1, -5], 0) is True
    assert below([5], 9) is True


def test_above():
    assert below([5], 1) is False
"""
# `total == limit` must become `total <= limit`.


@pytest.fixture
def calc(project: Project) -> Project:
    return project.write(calc_py=BUGGY, test_calc_py=TEST)
