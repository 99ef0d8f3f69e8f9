"""What past prompts left on disk: private files of one model and graph, a node of the prefix tree each, bounded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from filelock import FileLock, Timeout

from lsp_agent.engine.prefixes.host_memory import HostMemory, Shapes, bytes_of, carve
from lsp_agent.engine.state import StateSpec, recurrent_shapes, segment_shapes
from lsp_agent.paths import cache_dir

log = logging.getLogger(__name__)

_MAGIC = b"lsp-agent prefix 1\n"
_SUFFIX = ".prefix"
UNUSED_S = 30 * 86400
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Stored:
    """A file: the keys and values of `tokens`, which follow `start` others, and maybe a copy of the recurrent states
    after them (`checkpoint`). `before` and `after` identify all tokens up to its first and its last."""

    path: Path
    bytes: int
    start: int
    tokens: tuple[int, ...]
    before: str
    after: str
    checkpoint: bool


class PrefixLostError(Exception):
    """A file is gone, or damaged."""


class PrefixDisk:
    """Files in a folder that only the user can open, of at most `limit` bytes together.

    Nothing in them is executed or unpickled: a line of JSON, then the arrays as they are, with a checksum.
    """

    def __init__(self, folder: Path, specs: Iterable[StateSpec], limit: int) -> None:
        """Raises `OSError` where the folder is not the user's own, `filelock.Timeout` where another process has it."""
        self.limit, self._folder, self._specs = limit, folder, tuple(specs)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
            raise PermissionError(f"{folder} belongs to somebody else")
        folder.chmod(0o700)
        self._lock = FileLock(folder / "lock", timeout=0, mode=0o600)
        self._lock.acquire()
        os.utime(folder / "lock")
        self.used = 0

    def found(self) -> Iterator[Stored]:
        """What an earlier process left, shorter beginnings first; what cannot be read or has no room is removed."""
        every = []
        for path in self._folder.iterdir():
            if path.name != "lock":
                stored = self._header(path) if path.suffix == _SUFFIX else None
                if stored is None:
                    path.unlink(missing_ok=True)
                else:
                    every.append(stored)
        for stored in sorted(every, key=lambda one: one.start):
            if self.used + stored.bytes > self.limit:
                stored.path.unlink(missing_ok=True)
            else:
                self.used += stored.bytes
                yield stored

    def write(self, ids: Sequence[int], start: int, content: Arrays, checkpoint: Arrays | None) -> Stored | None:
        """Store what is kept for the last of `ids`, from `start` on; None when the disk refuses."""
        arrays = [*content.values(), *(checkpoint.values() if checkpoint else ())]
        crc = 0
        for array in arrays:
            crc = zlib.crc32(array, crc)
        tokens = [int(token) for token in ids[start:]]
        before, after = prompt_hash(ids[:start]), prompt_hash(ids)
        header: dict[str, Any] = {"start": start, "tokens": tokens, "before": before, "after": after, "crc": crc}
        header["checkpoint"] = checkpoint is not None
        path = self._folder / f"{after}{_SUFFIX}"
        temporary = path.with_suffix(".new")
        try:
            with os.fdopen(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
                file.write(_MAGIC + json.dumps(header).encode() + b"\n")
                for array in arrays:
                    file.write(memoryview(array).cast("B"))
                size = file.tell()
            temporary.replace(path)
        except OSError as error:
            log.warning("Past prompts are not kept on disk: %s", error.strerror or error)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            return None
        self.used += size
        return Stored(path, size, start, tuple(tokens), before, after, checkpoint is not None)

    def read(self, stored: Stored, memory: HostMemory) -> tuple[Arrays, Arrays | None, bool]:
        """Its keys and values, recurrent states, and whether `memory` had room for them; raises `PrefixLostError`."""
        shapes = segment_shapes(self._specs, len(stored.tokens))
        content, roomy = _arrays(shapes, memory)
        checkpoint = None
        if stored.checkpoint:
            checkpoint, more = _arrays(recurrent_shapes(self._specs), memory)
            roomy = roomy and more
        try:
            crc = 0
            with stored.path.open("rb") as file:
                file.readline()
                header = json.loads(file.readline())
                for array in [*content.values(), *(checkpoint.values() if checkpoint else ())]:
                    if file.readinto(memoryview(array).cast("B")) != array.nbytes:
                        raise PrefixLostError
                    crc = zlib.crc32(array, crc)
            if crc != header["crc"]:
                raise PrefixLostError
        except (OSError, ValueError, KeyError) as error:
            raise PrefixLostError from error
        return content, checkpoint, roomy

    def remove(self, stored: Stored) -> None:
        """Delete a file."""
        self.used -= stored.bytes
        with suppress(OSError):
            stored.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.release()

    def _header(self, path: Path) -> Stored | None:
        try:
            with path.open("rb") as file:
                if file.readline(len(_MAGIC)) != _MAGIC:
                    return None
                header = json.loads(file.readline(1 << 20))
                size = file.tell()
            tokens = tuple(int(token) for token in header["tokens"])
            checkpoint = bool(header["checkpoint"])
            size += _bytes_in_file(segment_shapes(self._specs, len(tokens)))
            size += _bytes_in_file(recurrent_shapes(self._specs)) if checkpoint else 0
            start, before, after = int(header["start"]), str(header["before"]), str(header["after"])
            if not tokens or path.stat().st_size != size:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Stored(path, size, start, tokens, before, after, checkpoint)


def _bytes_in_file(shapes: Shapes) -> int:
    """Without the gaps that there are between arrays in memory."""
    return sum(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())


def prompt_hash(ids: Sequence[int]) -> str:
    """Identifies tokens."""
    return hashlib.blake2b(np.asarray(ids, np.int64).tobytes(), digest_size=16).hexdigest()


def open_disk(package: Path, graph: str, specs: Sequence[StateSpec], limit: int) -> PrefixDisk | None:
    """The files of a model package and `graph`, which says how it is run; None where they cannot be had.

    Another package, graph, version of ONNX Runtime or layout of states has another folder.
    """
    if not limit:
        return None
    files = sorted(path for path in package.iterdir() if path.is_file() and not path.name.startswith("prepacked"))
    about = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = [_MAGIC.decode(), graph, ort.__version__, [str(spec) for spec in specs], str(package.resolve()), about]
    name = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()
    folder = cache_dir() / "prefixes"
    try:
        opened = PrefixDisk(folder / name, specs, limit)
        _remove_unused(folder)
        return opened
    except (OSError, Timeout) as error:
        log.warning("Past prompts are not kept on disk: %s", error)
        return None


def _remove_unused(folder: Path) -> None:
    """Remove what no engine has opened for `UNUSED_S`: of models that are gone, or run otherwise now."""
    for lock in folder.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > UNUSED_S:
            with suppress(Timeout, OSError), FileLock(lock, timeout=0):
                for path in lock.parent.iterdir():
                    if path != lock:
                        path.unlink()
                lock.unlink()
                lock.parent.rmdir()


def _arrays(shapes: Shapes, memory: HostMemory) -> tuple[Arrays, bool]:
    arrays = memory.arrays(shapes)
    if arrays is not None:
        return arrays, True
    return carve(np.empty(bytes_of(shapes), np.uint8), shapes), False
