"""What an architecture is: a config read off the checkpoint, and one attention-like and one MLP-like layer a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from lsp_agent.engine.gguf_file import GgufFile
    from lsp_agent.engine.graph import GraphBuilder


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder; sizes in elements, `rope_base` the rotary frequency base."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    context: int
    rope_base: float
    rms_epsilon: float

    def to_json(self) -> dict[str, Any]:
        """As written to the package's config.json."""
        return asdict(self)


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the package, made of GGUF tensors stacked along their rows.

    `linear`: a matrix [rows, columns] for `GraphBuilder.linear`. `vector`: fp32. `rows`: an embedding, kept as the
    checkpoint's own blocks. `fallback` names a tensor to use where the sources are missing (tied embeddings).
    """

    name: str
    sources: tuple[str, ...]
    kind: Literal["linear", "vector", "rows"]
    shape: tuple[int, ...]
    fallback: str | None = None


class Layer(Protocol):
    """A part of a decoder block: the weights it needs and the graph it builds, both named under `prefix`."""

    def weights(self, config: ModelConfig, prefix: str) -> Sequence[WeightSpec]:
        """The weights, by GGUF tensor name."""

    def build(self, graph: GraphBuilder, config: ModelConfig, prefix: str, x: str) -> str:
        """Append nodes that map normalised hidden states `x` [batch, length, hidden] to the same shape."""


@dataclass(frozen=True)
class Block:
    """One decoder block: `x += mixer(norm(x)); x += mlp(norm(x))`."""

    mixer: Layer
    mlp: Layer


@dataclass(frozen=True)
class Architecture:
    """A family of checkpoints. `name` is GGUF's `general.architecture`."""

    name: str
    read_config: Callable[[GgufFile], ModelConfig]
    block: Callable[[ModelConfig, int], Block]
