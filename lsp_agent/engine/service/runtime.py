"""Where the user's engine listens: a folder that only they can open, and in it the names of what belongs to it.

Imports nothing heavy: every process that asks an engine starts here.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from lsp_agent import __version__
from lsp_agent.errors import UserError
from lsp_agent.paths import cache_dir, state_dir

OVERRIDE = "LSP_AGENT_RUNTIME_DIR"
LONGEST_SOCKET = 103
"""Bytes of a socket's path: macOS takes 103, Linux 107."""
HAS_UNIX_SOCKETS = hasattr(socket, "AF_UNIX") and sys.platform != "win32"
_SCOPE = ("LSP_AGENT_MANIFEST_DIR", "LSP_AGENT_DEVICE")


@dataclass(frozen=True)
class About:
    """What an engine tells of itself in a file. `created` (see `_created`) tells its process from another of that id.

    `port`: of the loopback, 0 if it listens on a unix socket alone.
    """

    pid: int
    created: float
    version: str
    scope: str
    port: int = 0

    @classmethod
    def mine(cls, scope: str, port: int) -> About:
        """About this process."""
        return cls(os.getpid(), _created(psutil.Process()), __version__, scope, port)

    @property
    def process(self) -> psutil.Process | None:
        """The process; None when it is gone."""
        try:
            process = psutil.Process(self.pid)
            same = abs(_created(process) - self.created) < 1.0
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.Error:
            return None

    @property
    def memory(self) -> int:
        """Bytes of main memory that its end would set free; 0 when it is gone. (Mapped files count as free.)"""
        process = self.process
        try:
            used = process.memory_info() if process else None
        except psutil.Error:
            return 0
        return used.rss - getattr(used, "shared", 0) if used else 0


def _created(process: psutil.Process) -> float:
    """When a process began, in seconds that stay the same. Raises `psutil.Error`.

    Linux knows it since the boot; psutil makes a time of day of it, which moves when the clock is set, as after a
    laptop's sleep.
    """
    since = psutil.boot_time() if sys.platform == "linux" else 0.0
    created: float = process.create_time()
    return created - since


@dataclass(frozen=True)
class Place:
    """The files of one engine. Who has the `lock` is the engine; `environment` makes a process find the same place."""

    folder: Path
    name: str
    scope: str
    environment: Mapping[str, str]

    @property
    def socket(self) -> Path:
        """The unix socket."""
        return self.folder / f"{self.name}.sock"

    @property
    def lock(self) -> Path:
        """Held by the engine as long as it lives."""
        return self.folder / f"{self.name}.lock"

    @property
    def token(self) -> Path:
        """Holds the bearer token of the loopback port."""
        return self.folder / f"{self.name}.token"

    @property
    def log(self) -> Path:
        """Where the engine logs; rotated ones beside it."""
        return Path(self.environment["LSP_AGENT_STATE_DIR"]) / "logs" / f"{self.name}.log"

    def about(self) -> About | None:
        """What the engine that was here last said of itself; it may be gone."""
        return read_about(self._about)

    @property
    def _about(self) -> Path:
        return self.folder / f"{self.name}.json"

    def write_about(self, about: About) -> None:
        """For the engine."""
        write_private(self._about, json.dumps(asdict(about)))

    def clear(self) -> None:
        """Remove what tells clients where the engine is; for the engine, while it has the lock."""
        for path in (self.socket, self._about, self.token):
            path.unlink(missing_ok=True)

    def others(self) -> Iterator[About]:
        """The running engines of other versions for the same models and settings."""
        for path in self.folder.glob("engine-*.json"):
            about = read_about(path)
            if path != self._about and about is not None and about.scope == self.scope and about.process is not None:
                yield about

    def running(self) -> About | None:
        """The engine that can be asked here. One that is being killed is none, though its socket may still answer."""
        about = self.about()
        return about if about is not None and about.process is not None and self.listens() else None

    def listens(self) -> bool:
        """Whether something can be connected to here."""
        about = self.about()
        if about is not None and about.port and not HAS_UNIX_SOCKETS:
            with suppress(OSError), socket.create_connection(("127.0.0.1", about.port), timeout=5):
                return True
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(5)
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
            return True


def place() -> Place:
    """The place of the engine that this process's environment asks for. Raises `UserError` where none is safe."""
    settings = {
        "LSP_AGENT_CACHE_DIR": str(cache_dir().absolute()),
        "LSP_AGENT_STATE_DIR": str(state_dir().absolute()),
        **{name: os.environ[name] for name in _SCOPE if os.environ.get(name)},
    }
    scope = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    version = hashlib.sha256(__version__.encode()).hexdigest()[:4]
    name = f"engine-{scope}{version}"
    folder = runtime_folder(len(name) + len("/.sock"))
    return Place(folder, name, scope, {**settings, OVERRIDE: str(folder)})


def runtime_folder(room: int = 0) -> Path:
    """A folder that only this user can open, made if it is missing; `room` bytes must be left for a socket's name.

    Raises `UserError` when somebody else could reach into it.
    """
    chosen = os.environ.get(OVERRIDE)
    if chosen:
        folder = Path(chosen).absolute()
        if HAS_UNIX_SOCKETS and len(os.fsencode(folder)) + room > LONGEST_SOCKET:
            raise UserError(f"The path of {OVERRIDE} is too long for a socket ({folder}); choose a shorter one.")
        return _private(folder)
    for folder in _candidates():
        if not HAS_UNIX_SOCKETS or len(os.fsencode(folder)) + room <= LONGEST_SOCKET:
            return _private(folder)
    raise UserError(f"The engine needs a folder for its socket; set {OVERRIDE} to a private one with a short path.")


def _candidates() -> Iterator[Path]:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if not hasattr(os, "getuid"):
        yield state_dir().absolute() / "run"
        return
    # `su` and `sudo -E` leave another user's folder in the variable.
    if runtime and os.access(runtime, os.W_OK | os.X_OK) and Path(runtime).stat().st_uid == os.getuid():
        yield Path(runtime) / "lsp-agent"
    for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - what is made in it is checked
        if os.access(parent, os.W_OK | os.X_OK):
            yield Path(parent) / f"lsp-agent-{os.getuid()}"


def _private(folder: Path) -> Path:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about, parent = folder.lstat(), folder.parent.stat()
    except OSError as error:
        raise UserError(
            f"The engine's folder {folder} cannot be used ({error.strerror}); set {OVERRIDE} to another."
        ) from error
    if not hasattr(os, "getuid"):
        return folder
    if not stat.S_ISDIR(about.st_mode):
        raise UserError(f"{folder} is not a folder of its own; remove it, or set {OVERRIDE} to another.")
    if about.st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user, who could pose as the engine; set {OVERRIDE} to another.")
    if stat.S_IMODE(about.st_mode) & 0o077:
        raise UserError(f"Others may open {folder}; run `chmod 700 {folder}`, or set {OVERRIDE} to another.")
    theirs = parent.st_mode & 0o022 or parent.st_uid not in (0, os.getuid())
    if theirs and not parent.st_mode & stat.S_ISVTX:
        raise UserError(f"Others may replace what is in {folder.parent}; set {OVERRIDE} to a folder elsewhere.")
    return folder


def read_about(path: Path) -> About | None:
    """What an engine wrote of itself; None where nothing readable is."""
    try:
        return About(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only the user can read."""
    new = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(path)
