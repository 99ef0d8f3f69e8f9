"""The engine's own process: started by `lsp_agent.engine.service.client`, it ends with its parent.

The parent holds our standard input open; its end, also by kill -9, closes the pipe and we leave. JSON lines on
standard output say `{"progress": [done, total]}` while a first load packs experts, then `{"ready": true}` or
`{"error": sentence}`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from lsp_agent.errors import ExitCode, UserError

if TYPE_CHECKING:
    from lsp_agent.engine.service.server import EngineServer

Say = Callable[[dict[str, object]], None]


def main() -> None:
    """Load the package, listen on the socket, say so, serve until idle or orphaned."""
    parser = argparse.ArgumentParser(prog="lsp-agent engine process")
    parser.add_argument("--name", required=True)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--idle-seconds", type=float, required=True)
    arguments = parser.parse_args()
    say = _messages()
    threading.Thread(target=_leave_with_parent, args=(Path(arguments.socket).parent,), daemon=True).start()
    try:
        from lsp_agent.engine.engine import Engine
        from lsp_agent.engine.service.server import EngineServer

        engine = Engine.load(
            arguments.package,
            threads=arguments.threads,
            context=arguments.context,
            on_progress=lambda done, total: say({"progress": [done, total]}),
        )
    except UserError as error:
        say({"error": str(error)})
        sys.exit(error.exit_code)
    server = EngineServer(engine, arguments.name)
    os.umask(0o077)  # the socket file is the user's only, whatever folder it is in
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(arguments.socket)
    asyncio.run(_serve(server, listener, arguments.idle_seconds, say))


async def _serve(server: EngineServer, listener: socket.socket, idle_seconds: float, say: Say) -> None:
    http = uvicorn.Server(uvicorn.Config(server.app, log_level="warning", access_log=False, lifespan="off"))
    listener.listen()
    say({"ready": True})
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    remembered = server.last_used
    while not serving.done():
        if not server.busy and not server.broken and server.last_used > remembered:
            remembered = server.last_used
            await server.remember()
        if not server.busy and (server.broken or time.monotonic() - server.last_used > idle_seconds):
            http.should_exit = True
        await asyncio.wait([serving], timeout=min(1.0, idle_seconds))
    if server.broken:
        os._exit(ExitCode.ENVIRONMENT)  # what is left of CUDA may hang while it is torn down


def _messages() -> Say:
    """What writes messages to the parent; all else that is printed goes to the log from now on.

    ONNX Runtime prints the names of CUDA libraries that it misses.
    """
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return lambda message: print(json.dumps(message), file=pipe, flush=True)


def _leave_with_parent(folder: Path) -> None:
    while os.read(0, 4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)  # the parent, which made it, cannot any more
    os._exit(ExitCode.OK)


if __name__ == "__main__":
    main()
