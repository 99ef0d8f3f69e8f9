"""Logging of the server: to standard error, without file contents.

pygls and asyncio put whole messages, which hold the user's source code, into their log records' arguments.
"""

from __future__ import annotations

import logging
import sys


class WithoutContents(logging.Filter):
    """Keeps what a library's record says and drops what it quotes."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Strip arguments and the exception's text; its type stays."""
        record.args = ()
        record.msg = str(record.msg).splitlines()[0]
        if record.exc_info and isinstance(record.exc_info, tuple) and record.exc_info[0] is not None:
            record.msg += f" [{record.exc_info[0].__name__}]"
        record.exc_info = None
        return True


def configure(level: str) -> None:
    """Log to standard error from `level` (error, warning, info, debug) on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    quoting = WithoutContents()
    quotes = ("pygls", "asyncio")
    handler.addFilter(lambda record: record.name.split(".")[0] not in quotes or quoting.filter(record))
