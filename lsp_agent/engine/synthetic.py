"""Packages of random weights in a model's shape: for memory and speed, not for answers.

What a package holds follows from its config and scheme alone, so a plan needs no weights at all. On disk weights of
one shape share their bytes between layers: 48 layers take the disk of one of each kind, and in a GPU's memory as much
as real ones, where each is loaded on its own. Values have the size of trained ones (fan-in), so nothing overflows.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from gguf import GGMLQuantizationType as Type

from lsp_agent.engine.architecture import ExpertsConfig, LinearAttentionConfig, ModelConfig, WeightSpec
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.blocks import E8M0_BIAS
from lsp_agent.engine.checkpoints.weight_writers import WeightImporter
from lsp_agent.engine.decoder import decoder_weights
from lsp_agent.engine.package import WEIGHTS, Extent, Linear, Rows, Weight, WeightsWriter, write_index
from lsp_agent.engine.quantisation import SCHEMES, SchemeName
from lsp_agent.errors import UserError

TINY = ModelConfig(
    architecture="qwen3next",
    layers=4,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_size=64,
    intermediate=256,
    vocabulary=2048,
    context=4096,
    rope_base=1e6,
    rms_epsilon=1e-6,
    rotary=32,
    experts=ExpertsConfig(count=32, used=3, intermediate=64, shared_intermediate=64, normalise=True),
    linear_attention=LinearAttentionConfig(2, 4, 64, 64, 4, (0, 1, 2)),
)
"""A shape to try things with: 4 layers of every kind that Qwen3-Coder-Next has."""

_CODE_RMS = {4: 4.6, 8: 74.0}
"""Root mean square of uniformly random codes less the zero point."""
_E2M1_RMS = 2.5
_BATCH_VALUES = 1 << 24
_NORMALS = 1_048_573


@dataclass(frozen=True)
class Layout:
    """The config and weights of a package that need not exist, as `Package` has them."""

    config: ModelConfig
    weights: Mapping[str, Weight]


def layout(config: ModelConfig, scheme: SchemeName) -> Layout:
    """What an import of 16-bit floats by `scheme` would hold, each weight at its place in the file."""
    return Layout(config, _reserve(config, scheme, WeightsWriter(io.BytesIO())))


def with_layers(config: ModelConfig, layers: int | None) -> ModelConfig:
    """`config` with its first `layers` only."""
    if layers is None or layers >= config.layers:
        return config
    linear, experts = config.linear_attention, config.experts
    if linear is not None:
        linear = replace(linear, layers=tuple(index for index in linear.layers if index < layers))
    if experts is not None:
        experts = replace(experts, dense_layers=tuple(index for index in experts.dense_layers if index < layers))
    return replace(config, layers=layers, linear_attention=linear, experts=experts)


def make(folder: Path, config: ModelConfig, scheme: SchemeName, seed: int = 0) -> Path:
    """Write a package and return its folder; raises `UserError` when the disk has no room for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / WEIGHTS).open("wb") as file:
        writer = _SharingWriter(file)
        weights = _reserve(config, scheme, writer)
        free = shutil.disk_usage(folder).free
        if writer.size > free:
            raise UserError(
                f"A synthetic package takes {writer.size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free; "
                "set TMPDIR to a folder with more room."
            )
        filler = _Filler(writer, seed)
        for name, weight in weights.items():
            filler.fill(name, weight)
        writer.finish()
    write_index(folder, config, {"source": {"file": "random", "sha256": ""}, "scheme": scheme, "tokens": {}}, weights)
    return folder


def is_synthetic(header: Mapping[str, object]) -> bool:
    """Whether a package's config.json says that its weights are random."""
    return json.dumps(header.get("source"), sort_keys=True) == json.dumps({"file": "random", "sha256": ""})


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

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._known: dict[tuple[str, tuple[int, ...], str], Extent] = {}

    def reserve(self, shape: tuple[int, ...], dtype: str) -> Extent:
        """See `WeightsWriter.reserve`."""
        key = self.role, shape, dtype
        if key not in self._known:
            self._known[key] = super().reserve(shape, dtype)
        return self._known[key]


def _reserve(config: ModelConfig, scheme: SchemeName, writer: WeightsWriter) -> dict[str, Weight]:
    specs = [(spec, _fake(spec)) for spec in decoder_weights(architecture(config.architecture), config)]
    importer = WeightImporter(writer, SCHEMES[scheme], specs, lambda _: None)
    weights: dict[str, Weight] = {}
    for spec, tensors in specs:
        if isinstance(writer, _SharingWriter):
            writer.role = spec.name.rpartition(".")[2]
        weights[spec.name] = importer.reserve(spec, tensors)
    return weights


def _fake(spec: WeightSpec) -> list[_Tensor]:
    rows, columns = math.prod(spec.shape[:-1]), spec.shape[-1]
    if spec.kind == "experts":
        return [_Tensor(source, rows // len(spec.sources), columns) for source in spec.sources]
    return [_Tensor(spec.sources[0], rows, columns)]


class _Filler:
    """Writes random values, once for each extent."""

    def __init__(self, writer: WeightsWriter, seed: int) -> None:
        self._writer, self._random = writer, np.random.default_rng(seed)
        self._normals = self._random.standard_normal(_NORMALS, np.float32)
        self._written: set[int] = set()

    def fill(self, name: str, weight: Weight) -> None:
        """Write one weight."""
        if isinstance(weight, Extent):
            # Norms near 1, decays negative, gates and convolutions small.
            if name.endswith("norm"):
                self._put(weight, lambda shape: np.ones(shape, np.float32))
            elif name.endswith("ssm_a"):
                self._put(weight, lambda shape: -self._random.uniform(0.05, 4, shape))
            else:
                self._put(weight, lambda shape: self._normal(shape, 0.02))
        elif isinstance(weight, Rows):
            self._put(weight.blocks, lambda shape: _bfloat16(self._normal((shape[0], shape[1] // 2), 1.0)))
        else:
            self._fill_parts(weight)

    def _fill_parts(self, weight: Weight) -> None:
        assert not isinstance(weight, Extent | Rows)
        fan_in = math.sqrt(weight.columns)
        for part in weight.parts if isinstance(weight, Linear) else (weight.part,):
            if part.format is None:
                self._put(part.values, lambda shape: self._normal(shape, 1 / fan_in))
                continue
            self._put(part.codes, self._bytes)
            self._put(part.zero_points, self._bytes)
            if part.format.element == "e2m1":
                self._put(part.scales, partial(_exponents, deviation=1 / (_E2M1_RMS * fan_in)))
            else:
                self._put(part.scales, partial(self._scales, size=1 / (_CODE_RMS[part.format.bits] * fan_in)))

    def _scales(self, shape: tuple[int, ...], size: float) -> np.ndarray:
        return self._random.uniform(0.7, 1.3, shape) * size

    def _put(self, extent: Extent | None, values: Callable[[tuple[int, ...]], np.ndarray]) -> None:
        if extent is None or extent.offset in self._written:
            return
        self._written.add(extent.offset)
        step = max(1, _BATCH_VALUES // max(1, math.prod(extent.shape[1:])))
        for start in range(0, extent.shape[0], step):
            rows = min(step, extent.shape[0] - start)
            self._writer.write_rows(extent, start, values((rows, *extent.shape[1:])))

    def _bytes(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(self._random.bytes(math.prod(shape)), np.uint8).reshape(shape)

    def _normal(self, shape: tuple[int, ...], deviation: float) -> np.ndarray:
        # Repeated, which is ten times as fast; as the length is prime, every row begins somewhere else.
        values: np.ndarray = np.resize(self._normals, shape) * np.float32(deviation)
        return values


def _exponents(shape: tuple[int, ...], deviation: float) -> np.ndarray:
    return np.full(shape, E8M0_BIAS + round(math.log2(deviation)), np.uint8)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
