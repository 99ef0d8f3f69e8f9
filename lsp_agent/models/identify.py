"""Which model a checkpoint of the user's is."""

from __future__ import annotations

import re
from pathlib import Path

from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import describe
from lsp_agent.models.download import Progress, sha256_of
from lsp_agent.models.manifest import NAME_PATTERN, Manifest, shipped

PARAMETERS_DIFFER = 0.05
"""Manifests name rounded counts of parameters."""


def identify(path: Path, name: str | None, progress: Progress) -> Manifest:
    """What is known about a GGUF file or a Hugging Face folder, under `name` or its own; raises `UserError`.

    A file whose hash a manifest has is that model. Others are described from what they say about themselves, unless a
    manifest without a hash has the same name, architecture and size.
    """
    if not path.exists():
        raise UserError(
            f"There is no file {path}; give the path of a GGUF file or of a folder with safetensors.", ExitCode.USAGE
        )
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise UserError(
            f"{name!r} cannot be a model's name; use small letters, digits, dots and dashes.", ExitCode.USAGE
        )
    known = {m.source.sha256: m for m in shipped() if m.source and m.source.sha256}
    sizes = {m.source.size_bytes for m in known.values() if m.source}
    manifest = known.get(sha256_of(path, progress)) if path.is_file() and path.stat().st_size in sizes else None
    if manifest is not None:
        progress.say(f"This is {manifest.title}, licence {manifest.license}.")
        return manifest.model_copy(update={"name": name or manifest.name})
    from lsp_agent.engine.checkpoints.checkpoint import open_checkpoint

    manifest = describe.manifest_of(open_checkpoint(path), name)
    manifest.check_runnable()
    namesake = next((m for m in shipped() if m.name == manifest.name), None)
    if namesake is None:
        return manifest
    if namesake.source and namesake.source.sha256:
        raise UserError(
            f"{path.name} is not the file known as {manifest.name} (its SHA-256 differs): it is another version or "
            "damaged, so choose another name with --name."
        )
    alike = abs(manifest.parameters / namesake.parameters - 1) < PARAMETERS_DIFFER
    if manifest.architecture != namesake.architecture or not alike:
        raise UserError(f"{path.name} is not the model known as {manifest.name}; choose another name with --name.")
    progress.say(f"Taking this for {namesake.title}, licence {namesake.license}: its name, architecture and size fit.")
    sizes_of_this = {"parameters": manifest.parameters, "memory_bytes": manifest.memory_bytes}
    return namesake.model_copy(update=sizes_of_this)
