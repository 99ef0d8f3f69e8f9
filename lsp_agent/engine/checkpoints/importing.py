"""Checkpoints in, model packages out: a few rows at a time, resumable, atomic."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsp_agent import __version__
from lsp_agent.engine.architecture import WeightSpec
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.checkpoints.checkpoint import CheckpointTensor, nbytes, open_checkpoint
from lsp_agent.engine.checkpoints.matching import match_tensors
from lsp_agent.engine.checkpoints.partial_package import PartialPackage, open_partial
from lsp_agent.engine.checkpoints.tensor_reports import TensorReport
from lsp_agent.engine.checkpoints.weight_writers import WeightImporter
from lsp_agent.engine.decoder import decoder_weights
from lsp_agent.engine.footprint import Footprint, footprint
from lsp_agent.engine.gguf_blocks import CARRIERS
from lsp_agent.engine.package import FORMAT_VERSION, INDEX, WeightsWriter, encode_weight, write_index
from lsp_agent.engine.quantisation import SCHEMES, SchemeName
from lsp_agent.errors import UserError

Progress = Callable[[int, int], None]

TEXT_BYTES = 32_000_000
"""Room for what a package holds besides weights: tokenizer, config and index."""
BIG_PARAMETERS = 3_000_000_000
"""From here on 4 bits are the default: 8 would need more memory than most machines have."""
HASH_SHARE = 16
"""Hashing a byte takes about this fraction of the time of importing it; only progress depends on it."""


@dataclass(frozen=True)
class ImportReport:
    """What an import did; `sha256` is the source file's (of several files: of the lines that `sha256sum` prints)."""

    sha256: str
    scheme: SchemeName
    package_bytes: int
    footprint: Footprint
    tensors: tuple[TensorReport, ...]


class ImportPlan:
    """What an import of a GGUF file or a Hugging Face folder would do: everything is checked, nothing is written.

    `scheme` None takes `default_scheme`. Raises `UserError` for a damaged or incomplete checkpoint and for an
    unsupported architecture or tensor type.
    """

    def __init__(self, source: Path, scheme: SchemeName | None = None) -> None:
        self.source, self.checkpoint = source, open_checkpoint(source)
        self.config = self.checkpoint.config()
        specs = decoder_weights(architecture(self.checkpoint.architecture), self.config)
        self.matched = match_tensors(self.checkpoint, specs)
        self.scheme: SchemeName = scheme or default_scheme(self.matched)
        writer = WeightsWriter(io.BytesIO())
        importer = self._importer(writer, lambda _: None)
        self.layout = {spec.name: importer.reserve(spec, tensors) for spec, tensors in self.matched}
        self.weights_bytes = writer.size

    @property
    def package_bytes(self) -> int:
        """Disk that the package takes, at most: its weights to the byte, and `TEXT_BYTES`."""
        return self.weights_bytes + TEXT_BYTES

    @property
    def footprint(self) -> Footprint:
        """What the package takes when it runs on a CPU."""
        return footprint(self.layout.values())

    def reports(self, on_progress: Progress | None = None) -> tuple[TensorReport, ...]:
        """How exactly each tensor is, or would be, carried; reads some rows of each."""
        importer = self._importer(WeightsWriter(io.BytesIO()), lambda _: None)
        meter = _Meter(on_progress, len(self.matched))
        found: list[TensorReport] = []
        for spec, tensors in self.matched:
            found += importer.reports(spec, tensors)
            self.checkpoint.release()
            meter.add(1)
        return tuple(found)

    def check_disk(self, folder: Path, there: int = 0) -> None:
        """Raise `UserError` when the package does not fit into `folder`, of which `there` bytes are written already."""
        existing = next(p for p in [folder, *folder.resolve().parents] if p.exists())
        free, needed = shutil.disk_usage(existing).free, self.package_bytes - there
        if free < needed:
            raise UserError(
                f"Importing {self.source.resolve().name} needs {needed / 1e9:.2f} GB of disk and {existing} has "
                f"{free / 1e9:.2f} GB free; free some or choose a folder on a larger disk (LSP_AGENT_CACHE_DIR moves "
                "the installed models)."
            )

    def run(self, package: Path, on_progress: Progress | None = None) -> ImportReport:
        """See `import_checkpoint`."""
        if (
            package.exists()
            and not (package / INDEX).is_file()
            and not (package.is_dir() and not any(package.iterdir()))
        ):
            raise UserError(f"{package} is there already and is no model package; give the path of a new folder.")
        files = self.checkpoint.files()
        identity = self._identity(files)
        try:
            package.parent.mkdir(parents=True, exist_ok=True)
            with open_partial(package, identity) as partial:
                self.check_disk(package.parent, partial.allocated_bytes())
                work = sum(nbytes(t) for _, tensors in self.matched for t in tensors)
                meter = _Meter(on_progress, work + sum(file.stat().st_size for file in files) // HASH_SHARE)
                tokens = self.checkpoint.write_tokenizer(partial.folder)
                digest = _sha256(files, partial, meter)
                weights = self._write_weights(partial, meter)
                if self._identity(files) != identity:
                    raise UserError(f"{self.source} was changed while it was read; import it again.")
                source = {"file": self.source.resolve().name, "sha256": digest, "bytes": _size(files)}
                write_index(
                    partial.folder, self.config, {"source": source, "scheme": self.scheme, "tokens": tokens}, weights
                )
                size = sum(path.stat().st_size for path in partial.folder.iterdir())
                reports = self.reports()  # while an interruption still leaves something to continue
                partial.publish()
        except OSError as error:
            raise UserError(
                f"Cannot write {package}: {error.strerror or error}; free some space or choose another place, and "
                "start the import again: it continues with what is done."
            ) from error
        meter.finish()
        return ImportReport(digest, self.scheme, size, self.footprint, reports)

    def _importer(self, writer: WeightsWriter, progress: Callable[[int], None]) -> WeightImporter:
        return WeightImporter(writer, SCHEMES[self.scheme], self.matched, progress)

    def _identity(self, files: Sequence[Path]) -> dict[str, Any]:
        """What must be the same for an interrupted import to be continued."""
        sources = {spec.name: [(t.name, t.type.name) for t in tensors] for spec, tensors in self.matched}
        layout = {name: encode_weight(weight) for name, weight in self.layout.items()}
        what = json.dumps([self.config.to_json(), sources, layout])
        return {
            "journal": 1,
            "format": FORMAT_VERSION,
            "version": __version__,
            "scheme": self.scheme,
            "definition": repr(SCHEMES[self.scheme]),
            "weights": hashlib.sha256(what.encode()).hexdigest(),
            "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        }

    def _write_weights(self, partial: PartialPackage, meter: _Meter) -> dict[str, Any]:
        writer = WeightsWriter(partial.weights)
        importer = self._importer(writer, meter.add)
        reserved = [(spec, tensors, importer.reserve(spec, tensors)) for spec, tensors in self.matched]
        meter.add(sum(nbytes(t) for spec, tensors, _ in reserved if spec.name in partial.finished for t in tensors))
        for spec, tensors, weight in reserved:
            if spec.name not in partial.finished:
                filled = importer.fill(spec, tensors, weight)
                self.checkpoint.release()
                partial.note_finished(spec.name, filled, sum(map(nbytes, tensors)))
        partial.sync()
        writer.finish()
        return {spec.name: partial.finished[spec.name] for spec, _, _ in reserved}


def import_checkpoint(
    source: Path, package: Path, *, scheme: SchemeName | None = "keep", on_progress: Progress | None = None
) -> ImportReport:
    """Convert a GGUF file or a Hugging Face folder into the folder `package`, which is replaced if it is a package.

    `scheme` says how floating-point weights are rounded (None: `default_scheme`); quantised ones are carried as they
    are. The folder appears only when it is complete; an import that was killed continues after the last finished
    weight when it is started again with the same source and scheme. `on_progress(done, total)` counts source bytes.
    Raises `UserError` for a damaged or incomplete checkpoint, an unsupported architecture or tensor type, too small a
    disk, and when another process is importing into the same folder.
    """
    return ImportPlan(source, scheme).run(package, on_progress)


def default_scheme(matched: Sequence[tuple[WeightSpec, Sequence[CheckpointTensor]]]) -> SchemeName:
    """`keep` for a checkpoint that is quantised already; else `int4` for a big one and `int8` for a small one."""
    matrices = [t for spec, tensors in matched if spec.kind in ("linear", "experts") for t in tensors]
    floating = sum(t.rows * t.columns for t in matrices if t.type not in CARRIERS)
    if 2 * floating < sum(t.rows * t.columns for t in matrices):
        return "keep"
    return "int4" if floating > BIG_PARAMETERS else "int8"


class _Meter:
    def __init__(self, report: Progress | None, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def add(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        if self._report:
            self._report(self._done, self._total)

    def finish(self) -> None:
        self.add(self._total)


def _size(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _sha256(paths: Sequence[Path], partial: PartialPackage, meter: _Meter) -> str:
    for path in paths:
        if path.name in partial.hashes:
            meter.add(path.stat().st_size // HASH_SHARE)
            continue
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
                meter.add(len(chunk) // HASH_SHARE)
        partial.note_hash(path.name, digest.hexdigest())
    if len(paths) == 1:
        return partial.hashes[paths[0].name]
    lines = (f"{partial.hashes[path.name]}  {path.name}\n" for path in paths)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
