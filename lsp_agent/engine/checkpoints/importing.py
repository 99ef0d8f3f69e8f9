"""Checkpoints in, model packages out: tensor by tensor, a few rows at a time, atomically."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.checkpoints.checkpoint import open_checkpoint
from lsp_agent.engine.checkpoints.matching import match_tensors
from lsp_agent.engine.checkpoints.weight_writers import TensorReport, WeightImporter
from lsp_agent.engine.decoder import decoder_weights
from lsp_agent.engine.package import WEIGHTS, WeightsWriter, write_index
from lsp_agent.engine.quantisation import SCHEMES, SchemeName
from lsp_agent.errors import UserError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImportReport:
    """What an import did; `sha256` is the source file's (of several files: of the lines that `sha256sum` prints)."""

    sha256: str
    package_bytes: int
    tensors: tuple[TensorReport, ...]


def import_checkpoint(
    source: Path, package: Path, *, scheme: SchemeName = "keep", on_progress: Progress | None = None
) -> ImportReport:
    """Convert a GGUF file or a Hugging Face folder into the folder `package`, which is replaced if it exists.

    `scheme` says how floating-point weights are rounded; quantised ones are carried as they are. The folder appears
    only when it is complete. `on_progress(done, total)` counts source bytes. Raises `UserError` for a damaged or
    incomplete checkpoint, an unsupported architecture or tensor type, and a full disk.
    """
    checkpoint = open_checkpoint(source)
    config = checkpoint.config()
    specs = decoder_weights(architecture(checkpoint.architecture), config)
    matched = match_tensors(checkpoint, specs)
    package.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{package.name}-", dir=package.parent))
    try:
        tokens = checkpoint.write_tokenizer(folder)
        files = checkpoint.files()
        progress = _Meter(on_progress, 2 * sum(file.stat().st_size for file in files))
        digest = _sha256(files, progress)
        with (folder / WEIGHTS).open("wb") as handle:
            writer = WeightsWriter(handle)
            importer = WeightImporter(writer, SCHEMES[scheme], matched, progress.add)
            reserved = [(spec, tensors, importer.reserve(spec, tensors)) for spec, tensors in matched]
            weights = {spec.name: importer.fill(spec, tensors, weight) for spec, tensors, weight in reserved}
            writer.finish()
        about = {"source": {"file": source.name, "sha256": digest}, "scheme": scheme, "tokens": tokens}
        write_index(folder, config, about, weights)
        size = sum(path.stat().st_size for path in folder.iterdir())
        if package.exists():
            shutil.rmtree(package)
        folder.chmod(0o755)
        folder.rename(package)
    except OSError as error:
        raise UserError(
            f"Cannot write {package}: {error.strerror}; free some space or choose another place."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress.finish()
    reports = [report for spec, tensors in matched for report in importer.reports(spec, tensors)]
    return ImportReport(digest, size, tuple(reports))


class _Meter:
    def __init__(self, report: Progress | None, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def add(self, count: int) -> None:
        self._done = min(self._done + count, self._total)
        if self._report:
            self._report(self._done, self._total)

    def finish(self) -> None:
        self.add(self._total)


def _sha256(paths: Sequence[Path], progress: _Meter) -> str:
    lines = {}
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
                progress.add(len(chunk))
        lines[path.name] = digest.hexdigest()
    if len(lines) == 1:
        return next(iter(lines.values()))
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in lines.items()).encode()).hexdigest()
