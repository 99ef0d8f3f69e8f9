"""Makes a model package in the shape of Qwen3-Coder-Next with random weights, for speed and memory only.

    python benchmarks/synthetic_package.py FOLDER [--scheme int4] [--layers 48]

Weights of one shape share their bytes between layers, so 48 layers take the disk of four, and as much memory as real
ones once they are loaded onto a GPU. Values have the size of trained ones (fan-in), so that nothing overflows.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

from lsp_agent.engine.architecture import ExpertsConfig, LinearAttentionConfig, ModelConfig, WeightSpec
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.checkpoints.weight_writers import WeightImporter
from lsp_agent.engine.decoder import decoder_weights
from lsp_agent.engine.package import WEIGHTS, Extent, Linear, Rows, Weight, WeightsWriter, write_index
from lsp_agent.engine.quantisation import SCHEMES

CODE_RMS = {4: 4.6, 8: 74.0}
"""Root mean square of uniformly random codes less the zero point."""


def next_config(layers: int) -> ModelConfig:
    """Qwen3-Coder-Next's own numbers, with any number of layers."""
    linear = tuple(index for index in range(layers) if (index + 1) % 4)
    return ModelConfig(
        architecture="qwen3next",
        layers=layers,
        hidden=2048,
        heads=16,
        kv_heads=2,
        head_size=256,
        intermediate=5120,
        vocabulary=151936,
        context=262144,
        rope_base=1e7,
        rms_epsilon=1e-6,
        rotary=64,
        experts=ExpertsConfig(count=512, used=10, intermediate=512, shared_intermediate=512, normalise=True),
        linear_attention=LinearAttentionConfig(16, 32, 128, 128, 4, linear),
    )


@dataclass(frozen=True)
class _Tensor:
    """As much of a checkpoint's tensor as its layout depends on."""

    name: str
    rows: int
    columns: int
    type: Type = Type.BF16

    def read(self, start: int, stop: int) -> np.ndarray:
        raise NotImplementedError("random weights are written, not read")


class _SharingWriter(WeightsWriter):
    """Reserves one extent for all arrays of one shape and role."""

    role = ""

    def __init__(self, file) -> None:
        super().__init__(file)
        self.known: dict[tuple[str, tuple[int, ...], str], Extent] = {}

    def reserve(self, shape: tuple[int, ...], dtype: str) -> Extent:
        key = self.role, shape, dtype
        if key not in self.known:
            self.known[key] = super().reserve(shape, dtype)
        return self.known[key]


def _fake(spec: WeightSpec) -> list[_Tensor]:
    rows, columns = math.prod(spec.shape[:-1]), spec.shape[-1]
    if spec.kind == "experts":
        return [_Tensor(source, rows // len(spec.sources), columns) for source in spec.sources]
    return [_Tensor(spec.sources[0], rows, columns)]


def make(folder: Path, scheme: str, layers: int, seed: int = 0) -> Path:
    """Write the package and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = next_config(layers)
    specs = decoder_weights(architecture(config.architecture), config)
    random = np.random.default_rng(seed)
    with (folder / WEIGHTS).open("wb") as file:
        writer = _SharingWriter(file)
        importer = WeightImporter(writer, SCHEMES[scheme], [(s, _fake(s)) for s in specs], lambda _: None)
        weights: dict[str, Weight] = {}
        for spec in specs:
            writer.role = spec.name.rpartition(".")[2]
            weights[spec.name] = importer.reserve(spec, _fake(spec))
        written: set[int] = set()
        for name, weight in weights.items():
            _fill(writer, random, name, weight, written)
        writer.finish()
    write_index(folder, config, {"source": {"file": "random", "sha256": ""}, "scheme": scheme, "tokens": {}}, weights)
    return folder


def _fill(writer: WeightsWriter, random: np.random.Generator, name: str, weight: Weight, written: set[int]) -> None:
    def put(extent: Extent | None, values) -> None:
        if extent is not None and extent.offset not in written:
            written.add(extent.offset)
            writer.write_rows(extent, 0, values(extent.shape))

    def bytes_(shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(random.bytes(math.prod(shape)), np.uint8).reshape(shape)

    def normal(deviation: float):
        return lambda shape: (random.standard_normal(shape, np.float32) * deviation).astype(np.float32)

    if isinstance(weight, Extent):
        # Norms near 1, decays negative, gates and convolutions small.
        values = normal(0.02)
        if name.endswith("norm"):
            put(weight, lambda shape: np.ones(shape, np.float32))
        elif name.endswith("ssm_a"):
            put(weight, lambda shape: -random.uniform(0.05, 4, shape).astype(np.float32))
        else:
            put(weight, values)
    elif isinstance(weight, Rows):
        put(weight.blocks, lambda shape: _as_stored(weight.type, normal(1.0)((shape[0], shape[1] // 2))))
    else:
        for part in weight.parts if isinstance(weight, Linear) else (weight.part,):
            columns = weight.columns
            if part.format is None:
                put(part.values, normal(1 / math.sqrt(columns)))
                continue
            size = 1 / (CODE_RMS[part.format.bits] * math.sqrt(columns))
            put(part.codes, bytes_)
            put(part.zero_points, bytes_)
            if part.format.element == "e2m1":
                exponent = 127 + round(math.log2(1 / (2.5 * math.sqrt(columns))))
                put(part.scales, lambda shape, e=exponent: np.full(shape, e, np.uint8))
            else:
                put(part.scales, lambda shape, s=size: (random.uniform(0.7, 1.3, shape) * s).astype(np.float32))


def _as_stored(kind: str, values: np.ndarray) -> np.ndarray:
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(np.float16).view(np.uint8)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scheme", default="int4", choices=list(SCHEMES))
    parser.add_argument("--layers", type=int, default=48)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.scheme, arguments.layers)


if __name__ == "__main__":
    main()
