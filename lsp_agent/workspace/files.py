"""File operations that never leave the root, never write through a link, and survive a crash."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from lsp_agent.errors import UserError
from lsp_agent.paths import fsync_directory

if sys.platform == "linux":
    import fcntl

_FICLONE = 0x40049409  # linux/fs.h: share the blocks until one side is written


def resolve_inside(root: Path, path: str) -> Path:
    """The real place of the relative posix `path` below `root` (itself resolved), symbolic links inside followed.

    Raises `UserError` for absolute paths, `..`, anything inside `.git`, and links that lead out of `root`.
    """
    parts = path.split("/")
    if not path or "\0" in path or path.startswith("/") or Path(path).is_absolute() or {"", ".", ".."} & set(parts):
        raise UserError(f"{path!r} is not a path inside the workspace: use a relative path below {root}.")
    real = Path(os.path.realpath(root / path))
    if real == root or not real.is_relative_to(root):
        raise UserError(f"{path} leads out of the workspace through a symbolic link: open the folder that it leads to.")
    if any(part.lower() == ".git" for part in (*parts, *real.relative_to(root).parts)):
        raise UserError(f"{path} lies inside git's own files, which lsp-agent never changes.")
    return real


def read_or_none(path: Path) -> bytes | None:
    """The content of a regular file, or None if nothing is there."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def copy_file(source: Path, target: Path, *, clone: bool = True) -> bool:
    """Copy the bytes of a regular file to a new file `target` (0600), sharing blocks where the file system can.

    Never a hard link: whoever writes to the copy must not reach the original. Returns whether blocks were shared.
    """
    source_fd = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(source_fd, "rb") as reader, open_private(target, exclusive=True) as writer:
        if clone and sys.platform == "linux":
            with contextlib.suppress(OSError):
                fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
                return True
        shutil.copyfileobj(reader, writer, 1 << 20)
    return False


def open_private(path: Path, *, exclusive: bool = False) -> BinaryIO:
    """Open `path` (0600) for writing from its start; `exclusive`: it must not exist, not even as a link."""
    flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if exclusive else os.O_TRUNC) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o600), "wb")


def remove_tree(path: Path) -> None:
    """Remove a folder and all in it, even where tests took away permissions; nothing is followed."""
    for _ in range(3):
        try:
            shutil.rmtree(path)
            return
        except FileNotFoundError:
            return
        except RecursionError:
            break
        except OSError:
            for folder, names, _files in os.walk(path):
                for name in (".", *names):
                    inner = Path(folder, name)
                    with contextlib.suppress(OSError):
                        if not inner.is_symlink():
                            inner.chmod(0o700)
    # What is left is deeper than Python's recursion or guarded by attributes: the system's tool has no such limit.
    subprocess.run(["rm", "-rf", "--", str(path)], check=False, capture_output=True)


def write_durably(path: Path, content: bytes) -> None:
    """Replace `path` (0600) atomically: readers and a crash see the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open_private(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(path.parent)


def tree_digest(root: Path, paths: Iterable[str], overlay: dict[str, bytes] | None = None) -> str:
    """SHA-256 (hex) over path, kind, executable bit and content of `paths` below `root`; what is missing is left out.

    Links count as their target's text and are not followed. Files that cannot be read count as unreadable.
    """
    overlay = overlay or {}
    total = hashlib.sha256()
    for path in sorted(set(paths)):
        place = root / path
        try:
            mode = place.lstat().st_mode
        except OSError:
            mode = 0
        kind = b"x" if stat.S_ISREG(mode) and mode & 0o100 else b"f"
        if path in overlay:
            content = hashlib.sha256(overlay[path]).digest()
        elif stat.S_ISLNK(mode):
            kind, content = b"l", hashlib.sha256(os.fsencode(place.readlink())).digest()
        elif stat.S_ISREG(mode):
            try:
                with place.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").digest()
            except OSError:
                kind, content = b"?", b""
        else:
            continue
        name = os.fsencode(path)
        total.update(kind + len(name).to_bytes(4, "big") + name + content)
    return total.hexdigest()
