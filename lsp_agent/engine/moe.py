"""Mixture of experts: a router, routed experts, and a shared expert behind a sigmoid gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lsp_agent.engine.architecture import CONTRIB, ExpertsConfig, Layer, ModelConfig, WeightSpec
from lsp_agent.engine.layers import DenseMlp

if TYPE_CHECKING:
    from lsp_agent.engine.graph import GraphBuilder

SHARED = "_shexp"


@dataclass(frozen=True)
class MoeMlp:
    """The top experts of the router's softmax, weighted by it, and a `shared` one behind a sigmoid gate."""

    experts: ExpertsConfig
    shared: bool

    @property
    def _shared(self) -> DenseMlp | None:
        return DenseMlp(self.experts.shared_intermediate, SHARED) if self.shared else None

    def weights(self, config: ModelConfig, prefix: str) -> Sequence[WeightSpec]:
        """The router, the experts' projections (gate and up interleaved), and the shared expert."""
        count, width, hidden = self.experts.count, self.experts.intermediate, config.hidden
        router = f"{prefix}.ffn_gate_inp"
        gate_up = (f"{prefix}.ffn_gate_exps.weight", f"{prefix}.ffn_up_exps.weight")
        specs = [
            WeightSpec(router, (f"{router}.weight",), "linear", (count, hidden), sensitive=True),
            WeightSpec(f"{prefix}.experts_gate_up", gate_up, "experts", (count, 2 * width, hidden)),
            WeightSpec(
                f"{prefix}.experts_down", (f"{prefix}.ffn_down_exps.weight",), "experts", (count, hidden, width)
            ),
        ]
        if self._shared:
            gate = f"{router}{SHARED}"
            specs.append(WeightSpec(gate, (f"{gate}.weight",), "vector", (hidden, 1)))
            specs.extend(self._shared.weights(config, prefix))
        return specs

    def build(self, graph: GraphBuilder, config: ModelConfig, prefix: str, x: str) -> str:
        """See `Layer.build`."""
        logits = graph.reshape(graph.linear(x, f"{prefix}.ffn_gate_inp"), [-1, self.experts.count])
        names = (f"{prefix}.experts_gate_up", f"{prefix}.experts_down")
        routed = graph.experts(x, logits, *names, used=self.experts.used, normalise=self.experts.normalise)
        if not self._shared:
            return routed
        shared = self._shared.build(graph, config, prefix, x)
        gate = graph.op("Sigmoid", [graph.op("MatMul", [x, graph.vector(f"{prefix}.ffn_gate_inp{SHARED}")])])
        return graph.op("GatedAdd", [routed, shared, gate], domain=CONTRIB)


def mlp_of_block(config: ModelConfig, index: int, shared: bool) -> Layer:
    """The MLP of a block of a mixture of experts, some of whose blocks may be dense."""
    experts = config.experts
    return DenseMlp() if experts is None or index in experts.dense_layers else MoeMlp(experts, shared)
