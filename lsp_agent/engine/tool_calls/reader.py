"""What reads one call: a view of the answer so far, and the call as far as it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from lsp_agent.chat_model import Problem, Repair, ToolCallError
from lsp_agent.engine.tool_calls.schema import Argument

CALL_OPEN = "<tool_call>"
CALL_CLOSE = "</tool_call>"
CUT_OFF_MESSAGE = "The answer ended inside a tool call, which was not run; make the call again, whole."


class NeedMore(Exception):  # noqa: N818 - a control-flow signal
    """The text so far does not settle the question."""


@dataclass(frozen=True)
class View:
    """The part of the answer that a decision may look at: `text` up to `end`; `final` when nothing follows it."""

    text: str
    end: int
    final: bool

    def starts(self, literal: str, at: int) -> bool:
        """Whether `literal` stands at `at`; raises NeedMore while it may yet."""
        if self.text.startswith(literal, at, self.end):
            return True
        if not self.final and literal.startswith(self.text[at : self.end]):
            raise NeedMore
        return False

    def starts_cut_off(self, literal: str, at: int) -> bool:
        """Whether the answer ends at `at` or within a `literal` that begins there."""
        return self.final and literal.startswith(self.text[at : self.end])

    def skip_space(self, at: int) -> int:
        """Give the place of the next character that is no whitespace, or the end."""
        while at < self.end and self.text[at].isspace():
            at += 1
        return at

    def line_is_blank_before(self, at: int, start: int) -> bool:
        """Whether only whitespace stands before `at` on its line, whose text begins at `start` at the earliest."""
        line = max(start, self.text.rfind("\n", start, at) + 1)
        return not self.text[line:at].strip()

    def line_is_blank(self, at: int, blank_before: bool) -> bool:
        """Like `line_is_blank_before`, for a text whose own first line follows on from one that was blank or not."""
        return self.line_is_blank_before(at, 0) and (blank_before or self.text.find("\n", 0, at) >= 0)

    def find(self, literal: str, at: int) -> int:
        """Give the first place of `literal` from `at` on, or -1."""
        return self.text.find(literal, at, self.end)


@dataclass
class Draft:
    """A call as read so far. `end` is where its span ends, exclusive."""

    end: int
    name: str = ""
    arguments: list[Argument] = field(default_factory=list)
    problem: ToolCallError | None = None
    repairs: list[Repair] = field(default_factory=list)

    def mend(self, repair: Repair) -> None:
        """Note a repair, once."""
        if repair not in self.repairs:
            self.repairs.append(repair)

    def cut_off(self) -> None:
        """Note that the answer ended inside the call."""
        self.problem = ToolCallError(Problem.CUT_OFF, CUT_OFF_MESSAGE)


class Reader(ABC):
    """Reads one call whose opener was seen."""

    name: str | None = None
    """The tool's name, once it is known for good that this is a call."""

    @abstractmethod
    def read(self, view: View, cut_off: bool) -> Draft | None:
        """Read on. Gives the call when it is complete, or None when this was no call after all.

        Raises NeedMore, never when `view.final`. `cut_off`: the answer hit its length limit.
        """


def absorb_closers(view: View, at: int, closers: tuple[str, ...], draft: Draft) -> int:
    """Take closing tags that follow `at`, each only once expected; gives the end of the last one taken."""
    taken: set[str] = set()
    while True:
        place = view.skip_space(at)
        if place == view.end and not view.final:
            raise NeedMore
        found = next((closer for closer in closers if view.starts(closer, place)), None)
        if found is None:
            return at
        if found in taken:
            draft.mend(Repair.DOUBLED_CLOSER)
        taken.add(found)
        at = place + len(found)
