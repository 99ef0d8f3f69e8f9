"""`lsp-agent serve`: the language server on standard input and output, or on a loopback port for debugging."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, BinaryIO

import click

from lsp_agent.errors import UserError

if TYPE_CHECKING:
    from lsp_agent.lsp.server import AgentServer

LEVELS = ("error", "warning", "info", "debug")


@click.command()
@click.option("--tcp", metavar="PORT", type=click.IntRange(1, 65535), help="Listen on this loopback port instead.")
@click.option("--model", help="Use this installed model, whatever the settings say.")
@click.option("--log-level", type=click.Choice(LEVELS), default="warning", help="What goes to standard error.")
def serve(tcp: int | None, model: str | None, log_level: str) -> int:
    """Run the language server that editors talk to."""
    from lsp_agent.lsp.logs import configure
    from lsp_agent.lsp.server import create_server

    configure(log_level)
    # A job's thread that computes hands over to the event loop this soon; an answer takes several such turns.
    sys.setswitchinterval(0.001)
    server = create_server(model)

    def leave(number: int, _frame: FrameType | None) -> None:
        # The handler interrupts the main thread wherever it is, perhaps with a lock that leaving takes too.
        threading.Thread(target=server.leave, args=(128 + number,), name="leave", daemon=True).start()

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), leave)
    try:
        if tcp is not None:
            asyncio.run(_serve_one_client(server, tcp))
        else:
            server.start_io(*_claim_standard_streams())
    except SystemExit:
        pass  # how pygls leaves on `exit`; our own code says how it went
    finally:
        server.close()
    return server.exit_code


async def _serve_one_client(server: AgentServer, port: int) -> None:
    """Serve the first client that connects to the loopback `port`, until it leaves."""
    from pygls.io_ import run_async

    left = asyncio.Event()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        listener.close()
        server.protocol.set_writer(writer)
        try:
            await run_async(threading.Event(), reader, server.protocol, error_handler=server.report_server_error)
        except ConnectionError:
            pass  # the client is gone, and that is all there is to know
        finally:
            left.set()

    try:
        listener = await asyncio.start_server(connected, "127.0.0.1", port)
    except OSError as error:
        raise UserError(f"The port {port} cannot be used ({error.strerror}): choose another.") from error
    click.echo(f"lsp-agent listens on 127.0.0.1:{port}", err=True)
    await left.wait()


def _claim_standard_streams() -> tuple[BinaryIO, BinaryIO]:
    """Take standard input and output for the protocol alone.

    A stray `print` then goes to standard error, and a child process reads an empty input, never the editor's messages.
    """
    reader = io.BufferedReader(io.FileIO(os.dup(sys.stdin.fileno()), "rb"))
    writer = io.BufferedWriter(io.FileIO(os.dup(sys.stdout.fileno()), "wb"))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return reader, writer
