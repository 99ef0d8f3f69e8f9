"""The experts of several layers run in one session, as each would in its own."""

import numpy as np
import onnxruntime as ort
import pytest
from emulator import EmulatedKernels
from onnx import TensorProto, helper, numpy_helper

from lsp_agent.engine.gpu.operators import DOMAIN, Launcher, register
from lsp_agent.engine.gpu.shared_experts import SharedExperts
from lsp_agent.engine.graph import CONTRIB

KERNELS = EmulatedKernels()
COUNT, HIDDEN, WIDTH, USED, BLOCK = 6, 64, 32, 2, 32
ATTRIBUTES = {
    "k": USED,
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "normalize_routing_weights": 1,
    "expert_weight_bits": 4,
    "block_size": BLOCK,
}
SHAPES = {
    "gate_up.codes": (COUNT, 2 * WIDTH, HIDDEN // 2),
    "gate_up.scales": (COUNT, 2 * WIDTH, HIDDEN // BLOCK),
    "down.codes": (COUNT, HIDDEN, WIDTH // 2),
    "down.scales": (COUNT, HIDDEN, WIDTH // BLOCK),
}
PROVIDERS = ["CPUExecutionProvider"]


def layer_weights(layer):
    random = np.random.default_rng(layer)
    made = {}
    for name, shape in SHAPES.items():
        codes = name.endswith("codes")
        values = random.integers(0, 256, shape) if codes else random.random(shape) * 0.1 + 0.01
        made[f"blk.{layer}.{name}"] = values.astype(np.uint8 if codes else np.float16)
    return made


def session(nodes, initialisers=()):
    """x fp16 [1, tokens, HIDDEN] and logits fp16 [tokens, COUNT] to y."""
    half = TensorProto.FLOAT16
    given = [helper.make_tensor_value_info("x", half, [1, "tokens", HIDDEN])]
    given.append(helper.make_tensor_value_info("logits", half, ["tokens", "experts"]))
    result = helper.make_tensor_value_info("y", half, [1, "tokens", HIDDEN])
    graph = helper.make_graph(nodes, "g", given, [result], initialisers)
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 21), (DOMAIN, 1), (CONTRIB, 1))]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    register(options, Launcher("CPUExecutionProvider", KERNELS.launcher, 0, KERNELS.error_string))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS)


@pytest.fixture
def layers():
    return {name: values for layer in range(2) for name, values in layer_weights(layer).items()}


@pytest.fixture
def called(layers):
    """Two layers of experts in one session, called one after the other."""
    experts = SharedExperts(lambda name: layers[name].ctypes.data, "cpu", PROVIDERS)
    nodes = []
    for layer in range(2):
        tensors = {
            name: TensorProto(name=f"blk.{layer}.{name}", data_type=2 if name.endswith("codes") else 10, dims=shape)
            for name, shape in SHAPES.items()
        }
        weights = [tensors["gate_up.codes"], tensors["gate_up.scales"], None]
        weights += [tensors["down.codes"], tensors["down.scales"]]
        names = [["x", "logits"], ["between", "logits"]][layer]
        nodes.append(experts.node(names, weights, ["between", "y"][layer], **ATTRIBUTES))
    return experts, session(nodes)


def test_layers_called_say_what_layers_of_their_own_say(layers, called):
    nodes, initialisers = [], [numpy_helper.from_array(values, name) for name, values in layers.items()]
    for layer in range(2):
        gate_up, scales, down, down_scales = (f"blk.{layer}.{name}" for name in SHAPES)
        inputs = [["x", "between"][layer], "logits", gate_up, scales, "", down, down_scales]
        nodes.append(helper.make_node("QMoE", inputs, [["between", "y"][layer]], domain=CONTRIB, **ATTRIBUTES))
    own = session(nodes, initialisers)
    experts, shared = called
    assert len(experts.sessions) == 1 < len(experts.layers)
    random = np.random.default_rng(9)
    for tokens in (3, 1, 7):
        feeds = {
            "x": random.standard_normal((1, tokens, HIDDEN)).astype(np.float16),
            "logits": random.standard_normal((tokens, COUNT)).astype(np.float16),
        }
        (wanted,), (found,) = own.run(None, feeds), shared.run(None, feeds)
        np.testing.assert_allclose(found, wanted, rtol=0.01, atol=0.01 * np.abs(wanted).max())


def test_weights_are_read_where_they_lie(layers, called):
    feeds = {"x": np.ones((1, 2, HIDDEN), np.float16), "logits": np.eye(2, COUNT, dtype=np.float16)}
    (before,) = called[1].run(None, feeds)
    assert before.any()
    layers["blk.1.down.scales"][...] = 0
    (after,) = called[1].run(None, feeds)
    assert not after.any()


def test_what_goes_wrong_inside_is_said(called, monkeypatch):
    experts, shared = called

    def run(*_):
        raise RuntimeError("CUDA out of memory in there")

    for layer in experts.layers:
        monkeypatch.setattr(layer, "run", run)
    feeds = {"x": np.ones((1, 2, HIDDEN), np.float16), "logits": np.ones((2, COUNT), np.float16)}
    with pytest.raises(Exception, match="between: CUDA out of memory in there"):
        shared.run(None, feeds)
