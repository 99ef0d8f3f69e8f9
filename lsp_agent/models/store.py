"""Which models are installed, and which of them a name means.

A model is a folder `NAME` in `lsp_agent.paths.models_dir()` that holds the engine's package and `manifest.json`; it
appears there by one rename, complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lsp_agent import machine, paths
from lsp_agent.engine.service import runtime
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import select
from lsp_agent.models.manifest import InstalledModel, Manifest, shipped, unknown_name

MANIFEST_FILE = "manifest.json"
SOURCE_FILE = "source.gguf"


def package_dir(name: str) -> Path:
    """Where the model `name` is, or would be, installed."""
    return paths.models_dir() / name


def read(path: Path) -> InstalledModel | None:
    """Return the model in the folder `path`; None when there is none or its manifest is not readable.

    Where we ship a manifest for the same file under the same name, that one counts: it may have been corrected since.
    """
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    current = next((m for m in shipped() if m.name == path.name and same_file(m, manifest)), manifest)
    return InstalledModel(path.name, path, current)


def origin(path: Path) -> dict[str, Any]:
    """`file` and `scheme` that the package in `path` was made of and with; what it does not say is missing."""
    try:
        header = json.loads((path / "config.json").read_bytes())
        return {"file": header["source"]["file"], "scheme": header["scheme"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def disk_bytes(path: Path) -> int:
    """What the package in `path` takes, with all that the engine wrote beside it; holes of a file do not count."""
    return sum(512 * file.stat().st_blocks for file in path.rglob("*") if file.is_file())


def staging_dir(name: str) -> Path:
    """Where the model `name` is built before it is installed."""
    return paths.models_dir() / ".staging" / name


def begun() -> dict[str, int]:
    """Names of imports that were begun and are not finished, and the disk that they take, in bytes."""
    folder = staging_dir("x").parent
    return {path.name: disk_bytes(path) for path in sorted(folder.iterdir())} if folder.is_dir() else {}


def same_file(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests describe the same file, by its hash."""
    hashes = [m.source.sha256 if m.source else None for m in (one, other)]
    return hashes[0] is not None and hashes[0] == hashes[1]


def installed() -> list[InstalledModel]:
    """All installed models, smallest first."""
    folder = paths.models_dir()
    candidates = [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    models = [model for path in candidates if (model := read(path))]
    return sorted(models, key=lambda m: (m.manifest.parameters, m.name))


def available_memory() -> int:
    """Bytes of main memory a model may take now, with those that the user's engine gives back for another model."""
    try:
        about = runtime.place().about()
    except UserError:
        return machine.usable_memory()
    return machine.usable_memory() + (about.memory if about else 0)


def resolve(name: str | None) -> InstalledModel:
    """Return the installed model `name`, or for None the default that `select.choose` picks.

    Raises `UserError` that names the command to run when it is not installed or none fits.
    """
    models = installed()
    if name is None:
        choice = select.choose(models, available_memory())
        if choice.model is None:
            raise UserError(choice.advice)
        return choice.model
    for model in models:
        if model.name == name:
            return model
    known = {m.name: m for m in shipped()}
    if name in known:
        known[name].check_runnable()
        source = known[name].source
        how = f"pull {name}" if source and source.sha256 else f"import PATH --name {name}"
        raise UserError(f"The model {name} is not installed; run `lsp-agent model {how}`.")
    raise UserError(unknown_name(name, [*known, *(m.name for m in models if m.name not in known)]), ExitCode.USAGE)
