"""What our kernels make of a prompt's tokens is what ONNX Runtime's operators make of them."""

from collections import Counter

import numpy as np
import onnxruntime as ort
import pytest
from emulator import EmulatedKernels
from onnx import TensorProto, helper

from lsp_agent.engine.architecture import LinearAttentionConfig
from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.cuda_graph import CudaGraph
from lsp_agent.engine.decoder import build_decoder
from lsp_agent.engine.gpu.memory import HostMemory
from lsp_agent.engine.gpu.operators import DOMAIN, Launcher, register
from lsp_agent.engine.gpu.prompt_kernels import TOKENS, PromptKernels, covers
from lsp_agent.engine.gpu.shared_experts import SharedExperts
from lsp_agent.engine.gpu.weights import DeviceWeights
from lsp_agent.engine.graph import CONTRIB

KERNELS = {"forwards": EmulatedKernels(), "backwards": EmulatedKernels(backwards=True)}
LINEARS = {
    "small": LinearAttentionConfig(key_heads=2, value_heads=4, key_size=16, value_size=8, kernel=4, layers=()),
    "a short window": LinearAttentionConfig(
        key_heads=1, value_heads=3, key_size=8, value_size=136, kernel=2, layers=()
    ),
    "real heads": LinearAttentionConfig(key_heads=4, value_heads=8, key_size=128, value_size=128, kernel=4, layers=()),
}
EPSILON = 1e-6


def outputs(nodes, feeds, names, register_with=None):
    """Of a graph of these nodes; `feeds` are its inputs, weights among them."""
    kinds = {np.dtype(np.float16): TensorProto.FLOAT16, np.dtype(np.float32): TensorProto.FLOAT}
    given = [helper.make_tensor_value_info(name, kinds[value.dtype], value.shape) for name, value in feeds.items()]
    results = [helper.make_empty_tensor_value_info(name) for name in names]
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), (DOMAIN, 1), (CONTRIB, 1))]
    options = ort.SessionOptions()
    if register_with is not None:
        register(options, Launcher("CPUExecutionProvider", register_with.launcher, 0, register_with.error_string))
    model = helper.make_model(helper.make_graph(nodes, "g", given, results), opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(list(names), feeds)


def assert_near(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("order", KERNELS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 2), (1, 3), (3, 7), (1, TOKENS), (2, 2 * TOKENS + 5)])
@pytest.mark.parametrize("name", LINEARS)
def test_the_convolution_is_onnx_runtimes(name, batch, length, order):
    linear, random = LINEARS[name], np.random.default_rng(length)
    keys, values = linear.key_heads * linear.key_size, linear.value_heads * linear.value_size
    channels = 2 * keys + values
    assert covers(linear)
    rows = random.standard_normal((batch, length, channels + values)).astype(np.float16)
    past = random.standard_normal((batch, linear.kernel - 1, channels)).astype(np.float16)
    weight = random.standard_normal((channels, 1, linear.kernel)).astype(np.float32)
    names = ["q", "k", "v", "present"]
    node = PromptKernels(lambda _: weight.ctypes.data, _Compiler(KERNELS[order])).convolve(
        linear, "weight", ["rows", "past"], names
    )
    found = outputs([node], {"rows": rows, "past": past}, names, KERNELS[order])
    stock = helper.make_node(
        "CausalConvWithState",
        ["x", "w", "", "past"],
        ["y", "present"],
        domain=CONTRIB,
        activation="silu",
        channels_last=1,
    )
    feeds = {"x": np.ascontiguousarray(rows[..., :channels], np.float32), "w": weight, "past": past.astype(np.float32)}
    y, present = outputs([stock], feeds, ["y", "present"])
    for part, wanted in zip(found, np.split(y, [keys, 2 * keys], axis=-1), strict=False):
        assert_near(part, wanted)
    np.testing.assert_array_equal(found[3], present)


@pytest.mark.parametrize("order", KERNELS)
@pytest.mark.parametrize("name", LINEARS)
def test_the_gated_norm_is_a_norm_of_each_head_and_a_gate(name, order):
    linear, random = LINEARS[name], np.random.default_rng(1)
    keys, values = linear.key_heads * linear.key_size, linear.value_heads * linear.value_size
    y = random.standard_normal((2, 5, values)).astype(np.float16)
    rows = random.standard_normal((2, 5, 2 * keys + 2 * values)).astype(np.float16)
    weight = random.random(linear.value_size).astype(np.float32)
    node = PromptKernels(lambda _: weight.ctypes.data, _Compiler(KERNELS[order])).gate(
        linear, EPSILON, "weight", ["y", "rows"], "gated"
    )
    (found,) = outputs([node], {"y": y, "rows": rows}, ["gated"], KERNELS[order])
    heads = y.astype(np.float32).reshape(2, 5, -1, linear.value_size)
    normed = heads / np.sqrt((heads**2).mean(axis=-1, keepdims=True) + EPSILON) * weight
    gates = rows[..., 2 * keys + values :].astype(np.float32)
    assert_near(found, normed.reshape(y.shape) * gates / (1 + np.exp(-gates)))


def test_sizes_that_do_not_fit_the_kernels_are_left_to_onnx_runtime():
    assert not covers(LinearAttentionConfig(1, 1, 12, 16, 4, ()))
    assert not covers(LinearAttentionConfig(2, 4, 16, 6, 4, ()))


class _Compiler:
    """The emulator, with a compiler's interface."""

    def __init__(self, kernels):
        self.function = kernels.function


def test_a_prompts_graph_has_the_kernels_and_calls_and_all_that_they_read(gpu_package):
    one = gpu_package("qwen3-next", "int4")
    config, memory = one.config, HostMemory()
    weights = DeviceWeights(one, memory)
    calls = SharedExperts(weights.address, "cpu", ["CPUExecutionProvider"])
    kernels = PromptKernels(weights.address, _Compiler(KERNELS["forwards"]))
    graph = CudaGraph(one, 64, shared=True, calls=calls, kernels=kernels)
    build_decoder(architecture(config.architecture), config, graph)
    made = graph.model().graph
    kinds = Counter(node.op_type for node in made.node)
    linear = len(config.linear_attention.layers)
    assert kinds["Launch_hhhh"] == linear and kinds["Launch_h"] == linear + config.layers == linear + len(calls.layers)
    assert not {"QMoE", "CausalConvWithState", "GatedRMSNorm"} & kinds.keys()
    known = {value.name for value in made.input} | {tensor.name for tensor in made.initializer}
    for node in made.node:
        assert {name for name in node.input if name} <= known
        known |= set(node.output)
    assert {value.name for value in made.output} <= known
    assert not [tensor.name for tensor in made.initializer if ".experts_" in tensor.name]
