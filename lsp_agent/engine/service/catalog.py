"""Which models the engine may be asked for: installed ones, and package folders that its user named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsp_agent.errors import UnknownModel, UserError
from lsp_agent.models import MAX_CONTEXT, store
from lsp_agent.models.manifest import InstalledModel

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")


@dataclass(frozen=True)
class ServedModel:
    """A model as `/v1/models` lists it. `context_length` in tokens; `created` in Unix seconds.

    `sampling`: what its makers recommend, where a request says nothing. `infills`: it was trained to fill in the
    middle; None: the vocabulary tells.
    """

    name: str
    context_length: int
    created: int
    loaded: bool
    sampling: Mapping[str, float] = field(default_factory=dict)
    infills: bool | None = None


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `context`: most tokens of prompt and answer, if it can take so many."""

    name: str
    package: Path
    context: int = MAX_CONTEXT
    sampling: Mapping[str, float] = field(default_factory=dict)
    infills: bool | None = None

    @property
    def stamp(self) -> tuple[int, ...]:
        """Differs when another package was put in its place; empty when there is none."""
        try:
            about = (self.package / "config.json").stat()
        except OSError:
            return ()
        return about.st_dev, about.st_ino, about.st_mtime_ns

    @property
    def served(self) -> ServedModel:
        """Its entry in the list of models while it is not loaded."""
        created = self.stamp[-1] // 10**9 if self.stamp else 0
        return ServedModel(self.name, self.context, created, False, self.sampling, self.infills)


class Catalog:
    """Models by name. Not thread-safe: for the event loop."""

    def __init__(self, context: int | None = None, default: str | None = None) -> None:
        self._context = context
        self._named: dict[str, Source] = {}
        self.default = default
        """Answers requests that name no model; None: what `lsp-agent doctor` names."""

    def add(self, name: str, package: Path) -> None:
        """Let `name` mean a package folder. Raises `UserError`."""
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} cannot be a model's name; use letters, digits, dots and dashes.")
        if not package.is_absolute():
            raise UserError(f"{package} is not an absolute path; give the package folder's whole path.")
        if self._installed(name, package) is None:
            source = Source(name, package, self._context or MAX_CONTEXT)
            if not source.stamp:
                raise UserError(f"There is no model package in {package}; give the folder of one.")
            self._named[name] = source

    def source(self, name: str | None) -> Source:
        """The model that answers to `name`; None and "" are the default's. Raises `UnknownModel`, and `UserError` when
        no model is installed that fits."""
        name = name or self.default
        if name is not None and name in self._named:
            return self._named[name]
        try:
            installed = store.resolve(name)
        except UserError as error:
            raise (UnknownModel(str(error)) if name else error) from error
        return self._source(installed)

    def named(self, name: str) -> Source | None:
        """The package folder that was named so, if one was."""
        return self._named.get(name)

    def sources(self) -> list[Source]:
        """All models."""
        installed = {model.name: self._source(model) for model in store.installed()}
        return list((installed | self._named).values())

    def _installed(self, name: str, package: Path) -> InstalledModel | None:
        return next((m for m in store.installed() if m.name == name and m.path == package), None)

    def _source(self, installed: InstalledModel) -> Source:
        manifest = installed.manifest
        context = min(manifest.context_length, self._context or MAX_CONTEXT)
        sampling: dict[str, Any] = manifest.sampling.model_dump()
        return Source(installed.name, installed.path, context, sampling, manifest.fim is not None)
