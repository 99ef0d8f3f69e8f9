"""Which folders a Python needs, and which of the folders that it names may be seen in the sandbox."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

# Under the home folder these are never shown, whatever an interpreter claims to need.
_NEVER = (".ssh", ".aws", ".azure", ".gnupg", ".config", ".kube", ".docker", ".netrc", ".git-credentials", ".pypirc")
_MARKS = ("pyvenv.cfg", "conda-meta", "shims")
_LIBRARIES = ("site-packages", "dist-packages")


def home_folder() -> Path:
    """The user's home folder; "/" where none is known."""
    home = Path(os.environ.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111 - Path.home() may raise
    return home if home.is_absolute() else Path("/")


def link_chain(executable: Path) -> list[Path]:
    """Return every link from the interpreter to the real file: a sandbox without one of them cannot start it."""
    chain = []
    path = executable
    for _ in range(20):
        if not path.is_symlink():
            break
        path = Path(os.path.normpath(path.parent / path.readlink()))
        chain.append(path)
    return chain


def needed_by(executable: Path) -> list[Path]:
    """Return what a Python that nobody has asked yet may need: its files and folders, and those that it imports from.

    Read from the file system alone; with files of the workspace's own making, so filter it with `may_be_seen`.
    """
    files = [executable, *link_chain(executable), Path(os.path.realpath(executable))]
    prefixes = [file.parent.parent for file in files]
    for prefix in list(prefixes):
        base = _base_of(prefix / "pyvenv.cfg")
        if base is not None:
            prefixes += [base, Path(os.path.realpath(base))]
    libraries = [place for prefix in dict.fromkeys(prefixes) for place in _libraries(prefix)]
    users = list(_libraries(home_folder() / ".local"))
    linked = [path for library in [*libraries, *users] for path in _path_files(library)]
    variable = [Path(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part.startswith("/")]
    return list(dict.fromkeys([*files, *prefixes, *libraries, *users, *linked, *variable]))


def may_be_seen(path: Path, home: Path, private: Sequence[Path]) -> bool:
    """Whether `path`, which lies in one of the `private` folders, may be shown to code of the workspace.

    An interpreter of the workspace's own may name anything: no folder that holds a private one or secrets, no socket,
    nothing in a hidden folder of the home folder or in /run but installations of Python.
    """
    real = Path(os.path.realpath(path))
    for place in (path, real):
        if any(folder.is_relative_to(place) for folder in (home, *private)):
            return False
        if place.is_relative_to(home) and place.relative_to(home).parts[0] in _NEVER:
            return False
    if real.is_file():
        return os.access(real, os.X_OK) or real.suffix in (".zip", ".egg", ".whl")
    if not real.is_dir():
        return False
    plain = not real.is_relative_to("/run") and not (
        real.is_relative_to(home) and any(part.startswith(".") for part in real.relative_to(home).parts)
    )
    return plain or any(_is_installation(folder) for folder in _up_to(real, [home, *private]))


def _up_to(path: Path, ends: Sequence[Path]) -> Iterator[Path]:
    for folder in (path, *path.parents):
        if any(end.is_relative_to(folder) for end in ends):
            return
        yield folder


def _is_installation(folder: Path) -> bool:
    if folder.name in _LIBRARIES or any((folder / mark).exists() for mark in _MARKS):
        return True
    return next(folder.glob("lib*/python3*/os.py"), None) is not None


def _libraries(prefix: Path) -> Iterator[Path]:
    for name in _LIBRARIES:
        yield from prefix.glob(f"lib*/python3*/{name}")


def _base_of(configuration: Path) -> Path | None:
    """The installation that a virtual environment was made from."""
    for line in _lines(configuration):
        key, _, value = line.partition("=")
        if key.strip() == "home" and value.strip().startswith("/"):
            return Path(os.path.normpath(value.strip())).parent
    return None


def _path_files(library: Path) -> Iterator[Path]:
    """The folders that `.pth` files add: editable installs."""
    for file in sorted(library.glob("*.pth")):
        yield from (Path(os.path.normpath(line.strip())) for line in _lines(file) if line.startswith("/"))


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text("utf-8", "replace").splitlines() if "\0" not in line]
    except OSError:
        return []
