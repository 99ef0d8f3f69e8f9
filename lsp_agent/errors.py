"""Errors that users can cause, each shown as one sentence and never as a traceback."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every `lsp-agent` command."""

    OK = 0
    NOT_GREEN = 1
    USAGE = 2
    ENVIRONMENT = 3
    CANCELLED = 130


def one_line(text: str) -> str:
    """`text`, which may quote a stranger's, without line breaks and characters that do something to a terminal."""
    shown = (c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown)


class UserError(Exception):
    """Something the user can mend; the message is one clear sentence that says what to do.

    The command line prints the message and leaves with `exit_code`; the language server shows it.
    """

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.ENVIRONMENT) -> None:
        super().__init__(one_line(message))
        self.exit_code = exit_code


class PromptTooLong(UserError):  # noqa: N818 - named by what it says, as `Cancelled`
    """A prompt or text that does not fit the model's context: only a shorter one can be answered."""

    code = "context_length_exceeded"
    """As OpenAI's API calls it."""


class UnknownModel(UserError):  # noqa: N818 - named by what it says
    """A model of that name is not installed."""

    code = "model_not_found"


class EngineStopping(UserError):  # noqa: N818 - named by what it says
    """The engine is about to end; another one answers."""

    code = "engine_stopping"


class Unsupported(UserError):  # noqa: N818 - named by what it says
    """Something that this model, or the server it runs on, cannot do at all: asking again is of no use."""


class Cancelled(Exception):  # noqa: N818 - a control-flow signal, named like asyncio.CancelledError
    """Raised inside work whose `CancelToken` was cancelled."""
