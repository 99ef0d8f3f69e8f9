"""The graph of a decode step: one more token for each sequence, or a few of one that are to be verified.

It is of our own kernels, because ONNX Runtime launches many: its operators compute a token of Qwen3-Coder-Next in about
1,100 kernels of a few microseconds each; here it takes six or seven a block. Every node is an operator of `operators`,
shapes are static, and weights are addresses.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from lsp_agent.engine.architecture import Layer
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.decoder import HEAD
from lsp_agent.engine.delta_net import GatedDeltaNet
from lsp_agent.engine.gpu import expert_cache, expert_kernels, projection, routing_trace, sequence_kernels
from lsp_agent.engine.gpu.expert_kernels import ExpertForm, ExpertSizes, Routing, SharedExpert
from lsp_agent.engine.gpu.step_builder import CANDIDATES, NoKernel, Result, StepBuilder
from lsp_agent.engine.layers import Attention, DenseMlp
from lsp_agent.engine.moe import SHARED, MoeMlp
from lsp_agent.engine.package import Experts
from lsp_agent.engine.rotary import rotary_tables

EMBEDDING_TYPES: dict[str, Literal["float16", "bfloat16", "float32"]] = {
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
}

MOST_THAT_CHOOSE = 2
"""Tokens up to which every block of the experts' first kernel chooses them faster than a kernel before it."""


def build_step(graph: StepBuilder) -> None:
    """Append a whole step; raises `NoKernel`."""
    config, tokens = graph.config, graph.tokens
    table, kind = graph.weights.embedding()
    try:
        embed = projection.embed(config.hidden, tokens, EMBEDDING_TYPES[kind])
        (residual,) = graph.launch(embed, ["ids"], [("h", config.hidden)], [table])
        delta = ""
        for index in range(config.layers):
            block = architecture(config.architecture).block(config, index)
            for layer in (block.mixer, block.mlp):
                residual, delta = _layer(graph, layer, f"blk.{index}", residual, delta)
        logits, _, _ = graph.normed(residual, delta, "output_norm", [HEAD], name="logits")
        _candidates(graph, logits)
    except ValueError as error:  # sizes that a kernel does not cover
        raise NoKernel(str(error)) from error


def _layer(graph: StepBuilder, layer: Layer, prefix: str, residual: str, delta: str) -> tuple[str, str]:
    """A layer on `residual` plus `delta`: that sum, and what is to be added to it."""
    match layer:
        case Attention():
            return _attention(graph, layer, prefix, residual, delta)
        case GatedDeltaNet():
            return _delta_net(graph, prefix, residual, delta)
        case MoeMlp():
            return _mixture(graph, layer, prefix, residual, delta)
        case DenseMlp():
            return _mlp(graph, layer, prefix, residual, delta)
    raise NoKernel(type(layer).__name__)


def _candidates(graph: StepBuilder, logits: str) -> None:
    """The outputs beside the logits."""
    vocabulary, tokens = graph.config.vocabulary, graph.tokens
    _, *scratch = projection.candidates_scratch(vocabulary, tokens, CANDIDATES)
    results: list[Result] = [("f", CANDIDATES), ("i", CANDIDATES), ("f", 1), ("f", math.prod(scratch))]
    launch = projection.candidates(vocabulary, tokens, CANDIDATES)
    names = ["values", "tokens", "log_sum_exp"]
    graph.launch(launch, [logits], results, [graph.counters(tokens)], names)


def _attention(graph: StepBuilder, layer: Attention, prefix: str, residual: str, delta: str) -> tuple[str, str]:
    config = graph.config
    name = f"{prefix}.attn_qkv"
    bias = f"{name}_bias" if layer.bias else None
    packed, residual, _ = graph.normed(residual, delta, f"{prefix}.attn_norm", [name], bias=bias)
    width = config.heads * config.head_size
    stride = graph.height([name])
    sizes = (graph.batch, config.heads, config.kv_heads, config.head_size, config.rotary_size, stride, layer.gate)
    epsilon = config.rms_epsilon if layer.qk_norm else None
    kernel = sequence_kernels.attention_step(*sizes, epsilon, graph.rows)
    norms = [graph.vector(f"{prefix}.attn_{part}_norm") if layer.qk_norm else 0 for part in "qk"]
    tables = rotary_tables(config, graph.context)
    rotary = [
        graph.weights.constant(f"rotary.{part}", table.astype(np.float16))
        for part, table in zip(("cos", "sin"), tables, strict=True)
    ]
    caches = [f"past.{prefix}.{part}" for part in ("key", "value")]
    inputs = [packed, *caches, "lengths", "control"]
    if graph.rows > 1:
        append = sequence_kernels.append_tokens(*sizes, epsilon, graph.rows)
        inputs += graph.launch(append, inputs, [("i", 1)], [norms[1], *rotary])
    attended, _ = graph.launch(
        kernel.launch,
        inputs,
        [("f", width), ("f", -(-kernel.scratch // graph.tokens))],
        [*norms, *rotary, graph.counters(kernel.counters)],
    )
    output = f"{prefix}.attn_output"
    bias = f"{output}_bias" if layer.output_bias else None
    if layer.gate:
        return residual, graph.projected(
            projection.Gate(config.head_size, stride), [attended, packed], output, bias=bias
        )
    return residual, graph.projected(projection.Plain(), [attended], output, bias=bias)


def _delta_net(graph: StepBuilder, prefix: str, residual: str, delta: str) -> tuple[str, str]:
    linear = graph.config.linear_attention
    assert linear is not None
    names = [f"{prefix}.ssm_qkvz", f"{prefix}.ssm_ba"]
    packed, residual, _ = graph.normed(residual, delta, f"{prefix}.attn_norm", names)
    stride, width = graph.height(names), linear.value_heads * linear.value_size
    kernel = sequence_kernels.delta_step(graph.batch, linear, stride, graph.rows)
    pointers = [graph.vector(f"{prefix}.{name}") for name in ("ssm_conv1d", "ssm_a", "ssm_dt")]
    (attended,) = graph.launch(
        kernel.launch,
        [packed, f"past.{prefix}.conv", f"past.{prefix}.delta", "control"],
        [("f", width)],
        [*pointers, graph.counters(kernel.counters)],
    )
    offset = 2 * linear.key_heads * linear.key_size + width
    prologue = projection.GatedNorm(graph.config.rms_epsilon, linear.value_size, stride, offset)
    norm = graph.vector(f"{prefix}.ssm_norm")
    return residual, graph.projected(prologue, [attended, packed], f"{prefix}.ssm_out", norm)


def _mlp(graph: StepBuilder, layer: DenseMlp, prefix: str, residual: str, delta: str) -> tuple[str, str]:
    names = [f"{prefix}.ffn_{part}{layer.suffix}" for part in ("gate", "up", "down")]
    packed, residual, _ = graph.normed(residual, delta, f"{prefix}.ffn_norm", names[:2])
    return residual, graph.projected(projection.Swiglu(), [packed], names[2])


def _mixture(graph: StepBuilder, layer: MoeMlp, prefix: str, residual: str, delta: str) -> tuple[str, str]:
    sizes = ExpertSizes(layer.experts.count, layer.experts.used, graph.config.hidden, layer.experts.intermediate)
    router, gate_up, down = (f"{prefix}.{name}" for name in ("ffn_gate_inp", "experts_gate_up", "experts_down"))
    linears, shared = [router], None
    shared_down: list[int] = [0, 0, 0]
    if layer.shared:
        linears += [f"{router}{SHARED}", *(f"{prefix}.ffn_{part}{SHARED}" for part in ("gate", "up"))]
        (segment, *others), _, shared_down = graph.segments([f"{prefix}.ffn_down{SHARED}"])
        if others or segment.corrections:
            raise NoKernel(f"{prefix}.ffn_down{SHARED} has parts of several formats, or corrections")
        shared_down = shared_down[:3]  # codes, scales and zero points
        shared = SharedExpert(segment, layer.experts.shared_intermediate, sizes.count + 1, sizes.count)
    r, residual, normed = graph.normed(residual, delta, f"{prefix}.ffn_norm", linears, normed=True)
    stride, form, tokens = graph.height(linears), _expert_form(graph, gate_up, down), graph.tokens
    r = _follow_trace(graph, r, prefix, stride)
    table = graph.weights.expert_table(gate_up, down)
    used, width = sizes.used, sizes.width
    routing = Routing(stride, layer.experts.normalise)
    choice: list[Result] = [("i", used), ("f", used)]
    results: list[Result] = [("h", used * width)]
    if cache := graph.weights.experts.cache(gate_up, down):
        route = expert_cache.cache_route(tokens, sizes, form, routing, cache.slots)
        choice.append(("i", 2 * used + 1))  # rounded up: of all tokens together it is one more than twice these
        pointers = [cache.state, cache.home, cache.places, cache.table]
        experts, weights, copies = graph.launch(route, [r], choice, pointers)
        fetch = expert_cache.cache_fetch(sizes, form)
        (fetched,) = graph.launch(fetch, [copies], [("i", 1)], [cache.home, cache.places])
        up = expert_kernels.experts_up(tokens, sizes, form, cached=True)
        (activations,) = graph.launch(up.launch, [normed, experts, copies, fetched], results, [table])
    elif tokens <= MOST_THAT_CHOOSE:
        up = expert_kernels.experts_up(tokens, sizes, form, routing)
        activations, experts, weights = graph.launch(up.launch, [normed, r], results + choice, [table])
    else:
        route = expert_kernels.route(tokens, sizes, routing)
        experts, weights = graph.launch(route, [r], choice, [])
        up = expert_kernels.experts_up(tokens, sizes, form)
        (activations,) = graph.launch(up.launch, [normed, experts], results, [table])
    kernel = expert_kernels.experts_down(tokens, sizes, form, stride, shared)
    results = [("h", sizes.hidden)]
    if kernel.scratch:
        results.append(("f", -(-kernel.scratch // tokens)))
    counters = [graph.counters(kernel.counters)] if kernel.counters else []
    inputs = [activations, experts, weights, r if shared else ""]
    delta, *_ = graph.launch(kernel.launch, inputs, results, [table, *counters, *shared_down])
    return residual, delta


def _follow_trace(graph: StepBuilder, r: str, prefix: str, stride: int) -> str:
    """The router's results, with logits from the trace if there is one."""
    if graph.trace is None:
        return r
    assert graph.config.experts is not None
    launch = routing_trace.follow_trace(graph.batch, graph.config.experts.count, stride, graph.trace.tokens, graph.rows)
    return graph.launch(launch, [r, "lengths"], [("f", stride)], [graph.trace.layers[prefix]])[0]


def _expert_form(graph: StepBuilder, gate_up: str, down: str) -> ExpertForm:
    first, second = (graph.package.weights[name] for name in (gate_up, down))
    assert isinstance(first, Experts) and isinstance(second, Experts)
    form = first.part.format
    if form is None or second.part.format != form or form.corrected:
        raise NoKernel(f"{gate_up} in a format that the kernels do not read")
    return ExpertForm(form.element, form.bits, form.block, form.asymmetric)
