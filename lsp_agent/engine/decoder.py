"""A whole decoder from its architecture: the weights to import and the graph to run."""

from __future__ import annotations

from lsp_agent.engine.architecture import Architecture, ModelConfig, WeightSpec
from lsp_agent.engine.graph import GraphBuilder

EMBEDDING = "token_embd"
HEAD = "output"


def decoder_weights(architecture: Architecture, config: ModelConfig) -> list[WeightSpec]:
    """Every weight of the package, in the order in which the graph reads them."""
    table = (config.vocabulary, config.hidden)
    specs = [WeightSpec(EMBEDDING, ("token_embd.weight",), "rows", table)]
    for index in range(config.layers):
        block, prefix = architecture.block(config, index), f"blk.{index}"
        for norm, source, layer in (
            ("attn_norm", "attn_norm", block.mixer),
            ("ffn_norm", architecture.mlp_norm, block.mlp),
        ):
            specs.append(WeightSpec(f"{prefix}.{norm}", (f"{prefix}.{source}.weight",), "vector", (config.hidden,)))
            specs.extend(layer.weights(config, prefix))
    specs.append(WeightSpec("output_norm", ("output_norm.weight",), "vector", (config.hidden,)))
    head = WeightSpec(HEAD, ("output.weight",), "linear", table, fallback="token_embd.weight", sensitive=True)
    specs.append(head)
    return specs


def build_decoder(architecture: Architecture, config: ModelConfig, graph: GraphBuilder) -> None:
    """Inputs: embeddings [batch, length, hidden], cache; output: logits [rows, vocabulary] of the rows asked for."""
    residual, delta = graph.embeddings, None
    for index in range(config.layers):
        block, prefix = architecture.block(config, index), f"blk.{index}"
        for norm, layer in (("attn_norm", block.mixer), ("ffn_norm", block.mlp)):
            normed, residual = graph.rms_norm(residual, delta, f"{prefix}.{norm}", config.rms_epsilon)
            delta = layer.build(graph, config, prefix, normed)
    normed, _ = graph.rms_norm(residual, delta, "output_norm", config.rms_epsilon)
    graph.logits(graph.linear(graph.select_rows(normed, config.hidden), HEAD), config.vocabulary)
