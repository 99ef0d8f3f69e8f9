"""Install and remove models, safely next to other processes that do the same.

A model is built in a staging folder and appears under its name by one rename. A lock for each model makes a second
pull wait and then find it installed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from lsp_agent import paths
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import describe, store
from lsp_agent.models.download import Progress, fetch, partial_path, sha256_of, target_path, wheels_dir
from lsp_agent.models.manifest import NAME_PATTERN, InstalledModel, Manifest, find, shipped, unknown_name

DISK_MARGIN_BYTES = 256_000_000


class Importer(Protocol):
    """`engine.checkpoints.importing.import_checkpoint`: a GGUF file in, a package folder out, or `UserError`."""

    def __call__(self, source: Path, package: Path, *, on_progress: Callable[[int, int], None]) -> object:
        """Write the package folder, which does not exist before, in one step."""


def _importer() -> Importer:
    from lsp_agent.engine.checkpoints.importing import import_checkpoint

    return import_checkpoint


def downloads_dir() -> Path:
    """Files that are being fetched."""
    return paths.cache_dir() / "downloads"


@contextmanager
def model_lock(name: str, progress: Progress) -> Iterator[None]:
    """Keep other processes from installing or removing the model `name`; waits for them, and says so."""
    folder = paths.cache_dir() / "locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {paths.cache_dir()} cannot be written ({error.strerror}); mend its permissions or set "
            "LSP_AGENT_CACHE_DIR to another folder."
        ) from error
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say(f"Another process is working on {name}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def pull(
    name: str, progress: Progress, *, keep_source: bool = False, importer: Importer | None = None
) -> tuple[InstalledModel, bool]:
    """Fetch, check and install a known model; returns it, and False when it was installed already.

    Raises `UserError` in one sentence for everything a user can mend; nothing half-installed stays behind, and what
    was fetched does.
    """
    manifest = find(name)
    manifest.check_runnable()
    with model_lock(name, progress):
        if model := store.read(store.package_dir(name)):
            return model, False
        progress.say(f"{manifest.title}, by {manifest.developer}, licence {manifest.license}.")
        folder = downloads_dir()
        _check_disk(manifest, folder)
        with _disk_errors(name):
            gguf = fetch(manifest, folder, progress)
            model = _install(manifest, gguf, progress, importer, take_source=keep_source)
            gguf.unlink(missing_ok=True)
        return model, True


def import_file(
    path: Path, name: str | None, progress: Progress, *, importer: Importer | None = None
) -> tuple[InstalledModel, bool]:
    """Install a GGUF file the user has: under its known name when its hash is a manifest's, else `name` or its own.

    The file itself is left alone. Raises `UserError`.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}; give the path of a GGUF file.", ExitCode.USAGE)
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise UserError(
            f"{name!r} cannot be a model's name; use small letters, digits, dots and dashes.", ExitCode.USAGE
        )
    known = {m.source.sha256: m for m in shipped() if m.source and m.source.sha256}
    sizes = {m.source.size_bytes for m in known.values() if m.source}
    manifest = known.get(sha256_of(path, progress)) if path.stat().st_size in sizes else None
    if manifest is not None:
        progress.say(f"This is {manifest.title}, licence {manifest.license}.")
        if name is not None and name != manifest.name:
            manifest = manifest.model_copy(update={"name": name})
    else:
        manifest = describe.manifest_of(path, name)
    if manifest not in known.values() and manifest.name in {m.name for m in shipped()}:
        raise UserError(
            f"{path.name} is not the file known as {manifest.name} (its SHA-256 differs): it is another version or "
            "damaged, so choose another name with --name."
        )
    manifest.check_runnable()
    with model_lock(manifest.name, progress):
        if model := store.read(store.package_dir(manifest.name)):
            if model.manifest == manifest or store.same_file(model.manifest, manifest):
                return model, False
            raise UserError(
                f"Another model is installed as {manifest.name}; run `lsp-agent model rm {manifest.name}` first or "
                "choose another name with --name."
            )
        _need_disk(_package_bytes(manifest, path.stat().st_size), paths.models_dir(), manifest.name)
        with _disk_errors(manifest.name):
            return _install(manifest, path, progress, importer, take_source=False), True


def remove(name: str, progress: Progress) -> int:
    """Remove an installed model and what was fetched for it; returns the bytes freed, raises `UserError`."""
    leftovers = [where(downloads_dir(), name) for where in (target_path, partial_path, wheels_dir)]
    if not re.fullmatch(NAME_PATTERN, name) or not (
        store.package_dir(name).exists() or any(path.exists() for path in leftovers)
    ):
        installed = [m.name for m in store.installed()]
        if name in {m.name for m in shipped()}:
            raise UserError(f"The model {name} is not installed, so there is nothing to remove.", ExitCode.USAGE)
        raise UserError(unknown_name(name, installed), ExitCode.USAGE)
    with model_lock(name, progress), _staging(name) as trash:
        package = store.package_dir(name)
        if package.exists():
            package.rename(trash / "package")  # gone in one step; a program that has it open keeps its open files
        for path in leftovers:
            if path.exists():
                path.rename(trash / path.name)
        return sum(p.stat().st_size for p in trash.rglob("*") if p.is_file())


def _install(
    manifest: Manifest, gguf: Path, progress: Progress, importer: Importer | None, *, take_source: bool
) -> InstalledModel:
    begun = False

    def on_progress(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            begun = True
            progress.start(f"Importing {manifest.name}", 100)
        progress.update(100 * done // total)

    with _staging(manifest.name) as staging:
        built = staging / "package"
        try:
            (importer or _importer())(gguf, built, on_progress=on_progress)
        except (UserError, OSError):
            raise
        except Exception as error:  # a damaged file can upset any library that reads a piece of it
            raise UserError(
                f"{gguf.name} could not be imported ({error}); use an undamaged file of a supported model."
            ) from error
        if take_source:
            gguf.replace(built / store.SOURCE_FILE)
        (built / store.MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")
        _sync(built)
        package = store.package_dir(manifest.name)
        if package.exists():  # a folder without a readable manifest: no model, or `store.read` had found it
            package.rename(staging / "unreadable")
        built.rename(package)
        _sync_folder(package.parent)
    return InstalledModel(manifest.name, package, manifest)


@contextmanager
def _staging(name: str) -> Iterator[Path]:
    """Give an empty folder next to the packages, free of a killed process's leftovers; the lock makes it ours."""
    folder = paths.models_dir() / ".staging" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_disk(manifest: Manifest, folder: Path) -> None:
    size = (manifest.source.size_bytes if manifest.source else None) or 0
    fetched = [target_path(folder, manifest.name), partial_path(folder, manifest.name)]
    have = sum(path.stat().st_size for path in fetched if path.exists())
    wheels = 2 * manifest.pypi.part_bytes if manifest.pypi else 0  # pip keeps a temporary copy
    _need_disk(max(0, size - have) + wheels + _package_bytes(manifest, size), folder, manifest.name)


def _package_bytes(manifest: Manifest, gguf_bytes: int) -> int:
    return manifest.package_bytes or int(gguf_bytes * 1.5)


def _need_disk(count: int, folder: Path, name: str) -> None:
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    needed = count + DISK_MARGIN_BYTES
    if free < needed:
        raise UserError(
            f"Installing {name} needs {needed / 1e9:.1f} GB of disk and {existing} has {free / 1e9:.1f} GB free; "
            "free some or set LSP_AGENT_CACHE_DIR to a folder on a larger disk."
        )


@contextmanager
def _disk_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{name} could not be installed in {paths.cache_dir()}: {error.strerror or error}; free some disk or mend "
            "the folder's permissions, then try again."
        ) from error


def _sync(folder: Path) -> None:
    """Make a finished package survive a power cut before its name appears."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
