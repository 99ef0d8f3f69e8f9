"""Experts in main memory are fetched, before a prompt is read, by what the router says of its tokens."""

import numpy as np
import onnxruntime as ort
import pytest
from emulator import EmulatedKernels
from onnx import TensorProto, helper

from lsp_agent.engine.architectures import architecture
from lsp_agent.engine.cuda_graph import CudaGraph
from lsp_agent.engine.decoder import build_decoder
from lsp_agent.engine.gpu.expert_staging import (
    MARKING_BLOCKS,
    ExpertStaging,
    gather_experts,
    mark_experts,
)
from lsp_agent.engine.gpu.memory import HostMemory, view
from lsp_agent.engine.gpu.operators import DOMAIN, Launcher, register
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.gpu.weights import DeviceWeights

KERNELS = {"forwards": EmulatedKernels(), "backwards": EmulatedKernels(backwards=True)}
GATE_UP, DOWN = "blk.1.experts_gate_up", "blk.1.experts_down"


@pytest.fixture(scope="module")
def package(gpu_package):
    """`package(scheme)`: an imported package with experts."""
    return lambda scheme: gpu_package("qwen3-moe", scheme)


def wanted_experts(logits, used):
    """Whose logit is among the largest of any token, ties included."""
    least = np.sort(logits.astype(np.float32), axis=1)[:, -used]
    return (logits.astype(np.float32) >= least[:, None]).any(axis=0)


def marked(marks, experts):
    bits = np.unpackbits(np.bitwise_or.reduce(marks, axis=0).view(np.uint8), bitorder="little")
    return bits[:experts].astype(bool)


@pytest.mark.parametrize("order", KERNELS)
@pytest.mark.parametrize(("tokens", "experts", "used"), [(1, 32, 4), (3, 40, 10), (700, 512, 10), (5, 512, 1)])
def test_all_that_may_be_chosen_are_marked(tokens, experts, used, order):
    random = np.random.default_rng(tokens)
    # Few different values, so that many tie; some negative, some infinite.
    logits = (random.integers(-40, 12, (tokens, experts)) / 4).astype(np.float16)
    logits[:, random.integers(experts)] = -np.inf
    marks = np.full((MARKING_BLOCKS, -(-experts // 32)), -1, np.int32)
    KERNELS[order].run(mark_experts(experts, used), logits, np.array([logits.size]), marks)
    np.testing.assert_array_equal(marked(marks, experts), wanted_experts(logits, used))


@pytest.mark.parametrize("order", KERNELS)
def test_marked_experts_are_gathered_from_wherever_they_lie(order):
    random = np.random.default_rng(0)
    experts, strides, columns = 40, [4096, 48, 32784], [0, 2, 3]
    parts = [[random.integers(0, 256, stride, np.uint8) for _ in range(experts)] for stride in strides]
    table = np.zeros((experts, 6), np.int64)
    for column, part in zip(columns, parts, strict=True):
        table[:, column] = [array.ctypes.data for array in part]
    wanted = random.random(experts) < 0.4
    marks = np.zeros((MARKING_BLOCKS, 2), np.uint32)
    for expert in np.nonzero(wanted)[0]:
        marks[random.integers(MARKING_BLOCKS), expert // 32] |= np.uint32(1 << expert % 32)
    table[~wanted] = 0  # they are not looked at
    targets = [np.full((experts, stride), 7, np.uint8) for stride in strides]
    done = np.ones(1, np.float16)
    addresses = np.array([target.ctypes.data for target in targets])
    KERNELS[order].run(gather_experts(experts, 6, columns, strides), marks, done, table, addresses)
    assert done[0] == 0
    for target, part in zip(targets, parts, strict=True):
        np.testing.assert_array_equal(target[wanted], np.stack(part)[wanted])
        assert (target[~wanted] == 7).all()


@pytest.mark.parametrize("scheme", ["int4", "int4-asymmetric", "mxfp4"])
def test_the_graphs_operators_fetch_what_its_session_reads(package, scheme):
    one = package(scheme)
    memory, kernels = HostMemory(), KERNELS["forwards"]
    weights = DeviceWeights(one, memory, Placement("hybrid", 3))
    staging = ExpertStaging(weights.experts, memory, kernels)
    count = one.weights[DOWN].count
    logits = np.random.default_rng(1).standard_normal((2, count)).astype(np.float16)
    nodes = [helper.make_node("Identity", ["x"], ["logits"]), helper.make_node("Size", ["logits"], ["size"])]
    nodes += staging.nodes(GATE_UP, DOWN, "logits", "size", 4, "there")
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["tokens", count])
    there = helper.make_tensor_value_info("there", TensorProto.FLOAT16, [1])
    graph = helper.make_graph(nodes, "g", [given], [there])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    register(options, Launcher("CPUExecutionProvider", kernels.launcher, 0, kernels.error_string))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": logits})
    assert found.tolist() == [0]
    wanted = wanted_experts(logits, 4)
    assert 4 <= wanted.sum() <= 8
    fields = ("codes",) if scheme == "int4-asymmetric" else ("codes", "scales")
    for name in (GATE_UP, DOWN):
        for field in ("codes", "scales", "zero_points"):
            key = f"{name}.{field}"
            assert (staging.address(key) is not None) == (field in fields)
            if field in fields:
                tensor = weights.experts.tensors[key]
                shape = (count, tensor.stride)
                staged, home = (view(a, tensor.nbytes).reshape(shape) for a in (staging.address(key), tensor.address))
                np.testing.assert_array_equal(staged[wanted], home[wanted])
                assert not staged[~wanted].any()


def test_every_layer_is_fetched_before_its_experts_run(package):
    one = package("int4")
    weights = DeviceWeights(one, HostMemory(), Placement("host"))
    staging = ExpertStaging(weights.experts, HostMemory(), KERNELS["forwards"])
    graph = CudaGraph(one, 64, shared=True, staging=staging)
    build_decoder(architecture(one.config.architecture), one.config, graph)
    model = graph.model()
    producers = {output: node for node in model.graph.node for output in node.output}
    layers = [node for node in model.graph.node if node.op_type == "QMoE"]
    assert len(layers) == one.config.layers
    for node in layers:
        add = producers[node.input[0]]
        gather = producers[add.input[1]]
        assert gather.op_type == "Launch_h" and producers[gather.input[0]].input[0] == node.input[1]
    assert DOMAIN in [opset.domain for opset in model.opset_import]
    assert weights.share(model, graph.session_options(1), "cpu", staging)
