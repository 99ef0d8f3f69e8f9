"""What each quantisation scheme costs: perplexity, and divergence from the unrounded model, on the same text.

    python benchmarks/bench_schemes.py MODEL.gguf [--node-modules DIR] [--tokens 256] [--only NAME ...] [--json OUT]

The reference is the file's dequantised fp32 weights in fp32 arithmetic (the engine's exact mode, which equals
transformers). From it come a floating-point checkpoint, imported with every scheme, and llama.cpp's own files in the
types that PyPI `gguf` can write. A scheme runs in exact mode (what rounding the weights costs) and in fast mode
(activations rounded to 8 bits besides). `experts …` rounds the feed-forward matrices only and carries the rest exactly:
they stand in for experts, which these dense models have not. `DIR` holds `node_modules/node-llama-cpp`, see
bench_cpu.py.

KL is the mean over positions of KL(reference || model) in nats, `same best` the share of positions with the same best
token. Where the source is Q4_K_M already, its own row has no error of weights, and the others' errors come on top.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter, quants

from lsp_agent.engine.checkpoints import importing
from lsp_agent.engine.checkpoints.checkpoint import Checkpoint, CheckpointTensor
from lsp_agent.engine.checkpoints.conversion import values_of
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.package import Package
from lsp_agent.engine.quantisation import EIGHT, FOUR, FOUR_ASYMMETRIC, MXFP4, SCHEMES, Scheme
from lsp_agent.engine.tokens import Tokenizer

HERE = Path(__file__).parent
TEXTS = [  # of the standard library, which changes little, and prose
    Path(json.__file__).with_name("decoder.py"),
    Path(shutil.__file__),
    HERE.parent / "LICENSE",
    HERE.parent / "docs" / "architecture.md",
]
FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Variant:
    """A way to run the model: our engine with the matrices named in `only` rounded by `scheme`, or else llama.cpp on
    a file in `type` (None: the file as it is)."""

    name: str
    scheme: str | None = None
    type: Type | None = None
    only: tuple[str, ...] = ("",)


def _dense_scheme(form: object) -> Scheme:
    return replace(SCHEMES["keep"], ordinary=form, sensitive=EIGHT)  # type: ignore[arg-type]


EXPERTS = {"8 bit": EIGHT, "4 bit": FOUR, "4 bit asymmetric": FOUR_ASYMMETRIC, "MXFP4": MXFP4}
VARIANTS = [
    *(Variant(name, name) for name in SCHEMES if name not in ("keep", "mxfp4")),
    Variant("mxfp4 (feed-forward)", "dense mxfp4"),
    *(Variant(f"experts {name}", f"experts {name}", only=FEED_FORWARD) for name in EXPERTS),
    Variant("experts 4 bit asymmetric, down only", "experts 4 bit asymmetric", only=("ffn_down",)),
]
LLAMA = [Variant(f"llama.cpp {kind.name}", type=kind) for kind in (Type.Q8_0, Type.Q4_1, Type.Q4_0)]


@dataclass(frozen=True)
class FloatTensor:
    """A tensor of a GGUF file, dequantised as it is read."""

    source: CheckpointTensor
    type: Type = Type.F32

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def rows(self) -> int:
        return self.source.rows

    @property
    def columns(self) -> int:
        return self.source.columns

    def read(self, start: int, stop: int) -> np.ndarray:
        return values_of(self.source, start, stop).view(np.uint8)


@contextmanager
def in_floating_point(only: tuple[str, ...]) -> Iterator[None]:
    """Let imports find the matrices whose name has an `only`, but for the embedding, in fp32."""
    opened = importing.open_checkpoint

    def open_floats(path: Path) -> Checkpoint:
        checkpoint = opened(path)
        checkpoint.tensors = {  # type: ignore[misc]
            name: FloatTensor(tensor) if _chosen(name, tensor.rows, only) else tensor
            for name, tensor in checkpoint.tensors.items()
        }
        return checkpoint

    importing.open_checkpoint = open_floats
    yield
    importing.open_checkpoint = opened


def _chosen(name: str, rows: int, only: tuple[str, ...]) -> bool:
    return rows > 1 and name != EMBEDDING and any(part in name for part in only)


def write_gguf(source: Path, target: Path, kind: Type) -> None:
    """Copy a GGUF file with its matrices (but for the embedding) in another type.

    The head gets 8 bits where the others get fewer, as in the schemes.
    """
    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    kinds = {}
    for tensor in reader.tensors:
        matrix = len(tensor.shape) > 1 and tensor.name != EMBEDDING
        sensitive = tensor.name == "output.weight"
        kinds[tensor.name] = (Type.Q8_0 if sensitive else kind) if matrix else tensor.tensor_type
        shape = tuple(int(n) for n in reversed(tensor.shape))
        columns = shape[-1]
        per_block, block_bytes = quants.GGML_QUANT_SIZES[kinds[tensor.name]]
        row_bytes = columns // per_block * block_bytes
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        stored = (*shape[:-1], row_bytes) if kinds[tensor.name] not in (Type.F32, Type.F16) else shape
        dtype = np.dtype({Type.F32: np.float32, Type.F16: np.float16}.get(kinds[tensor.name], np.uint8))
        writer.add_tensor_info(tensor.name, stored, dtype, rows * row_bytes, raw_dtype=kinds[tensor.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        kind = kinds[tensor.name]
        same = kind == tensor.tensor_type
        writer.write_tensor_data(
            tensor.data if same else quants.quantize(quants.dequantize(tensor.data, tensor.tensor_type), kind)
        )
    writer.close()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log probabilities in float64 of fp32 logits [n, vocabulary]."""
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


class Comparison:
    """Sums what a model's logits differ by from the reference's, text by text."""

    def __init__(self, reference: list[np.ndarray], texts: list[list[int]]) -> None:
        self._reference, self._texts = reference, texts
        self._kl: list[float] = []
        self._same: list[bool] = []
        self._surprise: list[float] = []

    def add(self, index: int, logits: np.ndarray) -> None:
        for start in range(0, len(logits), 32):
            wanted = log_softmax(self._reference[index][start : start + 32])
            found = log_softmax(logits[start : start + 32])
            self._kl += (np.exp(wanted) * (wanted - found)).sum(axis=-1).tolist()
            self._same += (wanted.argmax(axis=-1) == found.argmax(axis=-1)).tolist()
            following = self._texts[index][start + 1 : start + 33]
            self._surprise += [-found[i, token] for i, token in enumerate(following)]

    def result(self) -> dict[str, float]:
        return {
            "kl": float(np.mean(self._kl)),
            "kl_p99": float(np.quantile(self._kl, 0.99)),
            "same_best": float(np.mean(self._same)),
            "perplexity": float(np.exp(np.mean(self._surprise))),
        }


@contextmanager
def engine_of(package: Path, accuracy: str, context: int) -> Iterator[Engine]:
    engine = Engine.load(package, threads=1, context=context, accuracy=accuracy)  # type: ignore[arg-type]
    yield engine
    del engine
    gc.collect()


def logits_of(engine: Engine, ids: list[int]) -> np.ndarray:
    """fp32 logits [len(ids), vocabulary]."""
    decoder = engine._decoder
    return decoder.run(np.array([ids], np.int64), decoder.new_state(len(ids)), range(len(ids)))


def reference_of(package: Path, texts: list[list[int]], kept: Path | None) -> list[np.ndarray]:
    """The exact logits of the texts; kept in a file, because exact arithmetic takes memory (8.5 GB of a 1.5B model)."""
    if kept is not None and kept.exists():
        stored = np.load(kept)
        assert np.array_equal(stored["ids"], np.concatenate(texts)), f"{kept} is of other texts or another model"
        return np.split(stored["logits"], np.cumsum([len(ids) for ids in texts])[:-1])
    with engine_of(package, "exact", max(map(len, texts)) + 16) as engine:
        logits = [logits_of(engine, ids) for ids in texts]
    if kept is not None:
        np.savez(kept, ids=np.concatenate(texts), logits=np.concatenate(logits))
    return logits


def llama_logits(gguf: Path, node_modules: Path, ids: list[int], folder: Path) -> np.ndarray:
    shutil.copy(HERE / "llama_logits.mjs", node_modules)
    (folder / "ids.json").write_text(json.dumps(ids))
    command = ["node", "llama_logits.mjs", str(gguf.resolve()), str(folder / "ids.json"), str(folder / "logits.bin")]
    subprocess.run(command, cwd=node_modules, check=True)
    return np.fromfile(folder / "logits.bin", np.float32).reshape(len(ids), -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--node-modules", type=Path)
    parser.add_argument("--tokens", type=int, default=256, help="of each of the four texts")
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--accuracy", nargs="+", default=["exact", "fast"])
    parser.add_argument("--reference", type=Path, help="an .npz file: the reference's logits, made if it is missing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    SCHEMES["dense mxfp4"] = _dense_scheme(MXFP4)  # type: ignore[index]
    for name, form in EXPERTS.items():
        SCHEMES[f"experts {name}"] = _dense_scheme(form)  # type: ignore[index]
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        carried = folder / "carried"
        importing.import_checkpoint(arguments.gguf, carried, scheme="keep")
        tokenizer = Tokenizer(Package(carried))
        texts = [tokenizer.encode(path.read_text())[: arguments.tokens] for path in TEXTS]
        reference = reference_of(carried, texts, arguments.reference)

        def report(name: str, mode: str, comparison: Comparison, **more: object) -> None:
            row = {"name": name, "mode": mode, **comparison.result(), **more}
            rows.append(row)
            print(json.dumps(row), flush=True)
            if arguments.json:
                about = {"model": arguments.gguf.name, "tokens": sum(map(len, texts)), "rows": rows}
                arguments.json.write_text(json.dumps(about, indent=1))

        def run_engine(name: str, package: Path, accuracies: list[str], **more: object) -> None:
            for accuracy in accuracies:
                comparison = Comparison(reference, texts)
                started = time.monotonic()
                with engine_of(package, accuracy, arguments.tokens + 16) as engine:
                    for index, ids in enumerate(texts):
                        comparison.add(index, logits_of(engine, ids))
                report(name, accuracy, comparison, seconds=round(time.monotonic() - started, 1), **more)

        def wanted(name: str) -> bool:
            return arguments.only is None or name in arguments.only

        if wanted("carried"):
            run_engine("carried", carried, ["exact", "fast"])
        for variant in VARIANTS:
            if not wanted(variant.name):
                continue
            package = folder / "package"
            started = time.monotonic()
            with in_floating_point(variant.only):
                imported = importing.import_checkpoint(arguments.gguf, package, scheme=variant.scheme)
            rounded = [tensor for tensor in imported.tensors if not tensor.exact]
            total = sum(tensor.values for tensor in rounded)
            squares = sum(tensor.values * tensor.relative_rms_error**2 for tensor in rounded)
            more = {
                "relative_rms_error": (squares / total) ** 0.5,
                "megabytes": imported.package_bytes / 1e6,
                "import_s": round(time.monotonic() - started, 1),
            }
            run_engine(variant.name, package, arguments.accuracy, **more)
            shutil.rmtree(package)
        if arguments.node_modules:
            for variant in [Variant("llama.cpp Q4_K_M"), *LLAMA]:
                if not wanted(variant.name):
                    continue
                file = arguments.gguf
                if variant.type is not None:
                    file = folder / "llama.gguf"
                    write_gguf(arguments.gguf, file, variant.type)
                comparison = Comparison(reference, texts)
                for index, ids in enumerate(texts):
                    comparison.add(index, llama_logits(file, arguments.node_modules, ids, folder))
                report(variant.name, "llama.cpp", comparison, megabytes=file.stat().st_size / 1e6)
    print(table(rows))


def table(rows: list[dict[str, object]]) -> str:
    """The rows in Markdown."""
    lines = ["| | mode | mean KL | 99th percentile | same best token | perplexity |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['mode']} | {row['kl']:.2e} | {row['kl_p99']:.2e} | {row['same_best']:.1%} "
            f"| {row['perplexity']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
