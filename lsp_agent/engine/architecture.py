"""What an architecture is: a config read off the checkpoint, and one attention-like and one MLP-like layer a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from lsp_agent.engine.graph import GraphBuilder

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's contributed operators."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: `linear` (Chen et al., 2023) or `yarn` (Peng et al., 2023).

    `factor` is the stretch, `original_context` the length that the model was first trained for.
    """

    kind: Literal["linear", "yarn"]
    factor: float
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None


@dataclass(frozen=True)
class ExpertsConfig:
    """Routed experts: `used` of `count` a token, each `intermediate` wide, beside a shared one where that has a width.

    `normalise`: whether the weights of a token's experts are scaled to sum to one. The blocks in `dense_layers` have
    an ordinary MLP instead.
    """

    count: int
    used: int
    intermediate: int
    shared_intermediate: int
    normalise: bool
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Gated DeltaNet in the blocks `layers`; sizes in elements a head, `kernel` is the convolution's length."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    kernel: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder; sizes in elements, `rope_base` the rotary frequency base.

    `rotary` elements of each head are rotated (all of them when None). `attention_bias`: biases on the projections
    of attention, where the architecture leaves it to the config.
    """

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
    rotary: int | None = None
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    experts: ExpertsConfig | None = None
    linear_attention: LinearAttentionConfig | None = None

    def to_json(self) -> dict[str, Any]:
        """As written to the package's config.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_json`; raises `TypeError` or `KeyError` for anything else."""
        parts: dict[str, type] = {
            "rope_scaling": RopeScaling,
            "experts": ExpertsConfig,
            "linear_attention": LinearAttentionConfig,
        }
        nested = {
            name: kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in values[name].items()})
            for name, kind in parts.items()
            if values.get(name) is not None
        }
        return cls(**{**values, **nested})

    @property
    def rotary_size(self) -> int:
        """Elements of each head that are rotated."""
        return self.head_size if self.rotary is None else self.rotary


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the package, made of the checkpoint's tensors (by GGUF name) stacked along their rows.

    `linear`: a matrix [rows, columns] for `GraphBuilder.linear`; a `sensitive` one keeps 8 bits where others get 4.
    `experts`: matrices [experts, rows, columns]; the rows of two sources (gate and up) are interleaved.
    `vector`: fp32 of any shape. `rows`: an embedding, kept as the checkpoint's own blocks.
    `fallback` names a tensor to use where the sources are missing (tied embeddings).
    """

    name: str
    sources: tuple[str, ...]
    kind: Literal["linear", "experts", "vector", "rows"]
    shape: tuple[int, ...]
    fallback: str | None = None
    sensitive: bool = False


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
    """A family of checkpoints.

    `name` is GGUF's `general.architecture`, `hf_name` the `model_type` of Hugging Face's config.json. `zero_centred`:
    Hugging Face stores the weights of the norms less one. `mlp_norm`: GGUF's name of a block's second norm.
    `normalise_experts`: whether the weights of a token's experts sum to one, where the checkpoint does not say (GGUF).
    """

    name: str
    hf_name: str
    block: Callable[[ModelConfig, int], Block]
    zero_centred: bool = False
    mlp_norm: str = "ffn_norm"
    normalise_experts: bool = True
