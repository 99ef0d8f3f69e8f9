"""The kernels of Gated DeltaNet's and attention's steps, emulated, against ONNX Runtime's operators and NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
import pytest
from emulator import EmulatedKernels
from onnx import TensorProto, helper, numpy_helper

from lsp_agent.engine.architecture import CONTRIB, LinearAttentionConfig
from lsp_agent.engine.cpu_graph import L2_EPSILON
from lsp_agent.engine.gpu.sequence_kernels import SequenceKernel, attention_step, delta_step


@pytest.fixture(scope="module", params=[False, True], ids=["forwards", "backwards"])
def kernels(request: pytest.FixtureRequest) -> EmulatedKernels:
    return EmulatedKernels(backwards=request.param)


def halves(random: np.random.Generator, *shape: int) -> np.ndarray:
    """fp32 values that fp16 holds exactly."""
    return random.normal(size=shape).astype(np.float16).astype(np.float32)


class DeltaReference:
    """The delta rule of the CPU provider, with the nodes of `CpuGraph.delta_rule`; states as the kernel has them."""

    def __init__(self, linear: LinearAttentionConfig, conv: np.ndarray, a: np.ndarray, dt: np.ndarray) -> None:
        keys, size, served = linear.key_heads, linear.key_size, linear.value_heads // linear.key_heads
        widths = [keys * size, keys * size, linear.value_heads * linear.value_size]
        constants = {
            "conv_weight": conv,
            "a": a,
            "dt": dt,
            "unit": np.full(size, 1 / math.sqrt(size), np.float32),
            "widths": np.array(widths, np.int64),
            "by_head": np.array([0, 0, keys, size], np.int64),
            "flat": np.array([0, 0, keys * size], np.int64),
            "single": np.array([0, 0, keys, 1, size], np.int64),
            "served": np.array([1, 1, 1, served, 1], np.int64),
            "repeated": np.array([0, 0, linear.value_heads * size], np.int64),
        }
        norm = {"axis": -1, "epsilon": L2_EPSILON / size}
        rule = {"q_num_heads": keys, "kv_num_heads": linear.value_heads, "update_rule": "gated_delta"}
        conv_attributes = {"activation": "silu", "channels_last": 1}
        nodes = [
            ("CausalConvWithState", ["p", "conv_weight", "", "conv"], ["convolved", "new_conv"], conv_attributes),
            ("Split", ["convolved", "widths"], ["q", "k", "v"], {"axis": -1}),
            ("Reshape", ["q", "by_head"], ["q_heads"], {}),
            ("Reshape", ["k", "by_head"], ["k_heads"], {}),
            ("SimplifiedLayerNormalization", ["q_heads", "unit"], ["q_unit"], norm),
            ("SimplifiedLayerNormalization", ["k_heads", "unit"], ["k_unit"], norm),
            ("Reshape", ["q_unit", "flat"], ["query"], {}),
            ("Reshape", ["k_unit", "single"], ["k_single"], {}),
            ("Expand", ["k_single", "served"], ["k_served"], {}),
            ("Reshape", ["k_served", "repeated"], ["key"], {}),
            ("LinearAttentionGate", ["step", "dt", "a", "rate"], ["decay", "beta"], {}),
            ("LinearAttention", ["query", "key", "v", "delta", "decay", "beta"], ["y", "new_delta"], rule),
        ]
        contrib = {"CausalConvWithState", "LinearAttentionGate", "LinearAttention"}
        graph = helper.make_graph(
            [helper.make_node(n, i, o, domain=CONTRIB if n in contrib else "", **at) for n, i, o, at in nodes],
            "delta",
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("p", "conv", "delta", "step", "rate")],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "new_conv", "new_delta")],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        self._session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self._linear, self._channels = linear, sum(widths)

    def __call__(self, p: np.ndarray, conv: np.ndarray, delta: np.ndarray) -> tuple[np.ndarray, ...]:
        """y, the convolution's new state and the new state of the rule."""
        linear = self._linear
        served = linear.value_heads // linear.key_heads
        gates = p[:, self._channels + linear.value_heads * linear.value_size :][:, : 2 * linear.value_heads]
        by_key_head = gates.reshape(len(p), linear.key_heads, 2, served)
        rate, step = (by_key_head[:, :, part].reshape(len(p), 1, -1) for part in (0, 1))
        feeds = {
            "p": p[:, None, : self._channels],
            "conv": conv.astype(np.float32),
            "delta": delta.swapaxes(2, 3),
            "step": step,
            "rate": rate,
        }
        y, new_conv, new_delta = self._session.run(None, {k: np.ascontiguousarray(v) for k, v in feeds.items()})
        return y[:, 0], new_conv, new_delta.swapaxes(2, 3)


SMALL = LinearAttentionConfig(key_heads=2, value_heads=4, key_size=16, value_size=8, kernel=4, layers=())
DELTA = {
    "small": (2, 3, SMALL, {}),
    "in place": (2, 1, SMALL, {}),
    "a value head each": (1, 2, LinearAttentionConfig(3, 3, 24, 10, 3, ()), {}),
    "real head sizes": (1, 2, LinearAttentionConfig(1, 2, 128, 128, 4, ()), {}),
    "one block a head": (1, 2, LinearAttentionConfig(1, 3, 256, 32, 2, ()), {"splits": 1, "threads": 64}),
}


@pytest.mark.parametrize("case", DELTA)
def test_delta_step_is_the_cpu_providers_delta_rule(case: str, kernels: EmulatedKernels) -> None:
    batch, ring, linear, tuning = DELTA[case]
    random = np.random.default_rng(7)
    width = linear.value_heads * linear.value_size
    channels = 2 * linear.key_heads * linear.key_size + width
    stride = channels + width + 2 * linear.value_heads + 3  # whatever else shares the projection
    conv_weight = random.normal(size=(channels, 1, linear.kernel)).astype(np.float32)
    a = -np.exp(random.normal(size=linear.value_heads)).astype(np.float32)
    dt = random.normal(size=linear.value_heads).astype(np.float32)
    reference = DeltaReference(linear, conv_weight, a, dt)
    kernel = delta_step(batch, linear, stride, **tuning)
    conv_ring = random.normal(size=(ring, batch, linear.kernel - 1, channels)).astype(np.float16)
    shape = (ring, batch, linear.value_heads, linear.value_size, linear.key_size)
    delta_ring = random.normal(size=shape).astype(np.float32)
    counters = np.zeros(kernel.counters, np.int32)

    for run in range(ring + 1):
        turn, following = run % ring, (run + 1) % ring
        p = halves(random, batch, stride) * 3
        expected = reference(p, conv_ring[turn], delta_ring[turn])
        before = conv_ring.copy(), delta_ring.copy()
        control = np.array([turn, 0, ring, 0], np.int32)
        y = np.full((batch, width), np.nan, np.float32)
        kernels.run(kernel.launch, p, conv_ring, delta_ring, control, y, conv_weight, a, dt, counters)
        np.testing.assert_allclose(y, expected[0], rtol=2e-4, atol=2e-5)
        np.testing.assert_array_equal(conv_ring[following], expected[1].astype(np.float16))
        np.testing.assert_allclose(delta_ring[following], expected[2], rtol=2e-4, atol=2e-5)
        for place in set(range(ring)) - {following}:
            np.testing.assert_array_equal(conv_ring[place], before[0][place])
            np.testing.assert_array_equal(delta_ring[place], before[1][place])
        assert not counters.any()


def test_delta_step_opens_its_gates_wide(kernels: EmulatedKernels) -> None:
    """Softplus neither overflows nor loses small rates; a state that decays away leaves no NaN."""
    random = np.random.default_rng(3)
    linear = LinearAttentionConfig(1, 2, 8, 4, 2, ())
    channels, width = 24, 8
    stride = channels + width + 4
    weights = [random.normal(size=(channels, 1, 2)), np.array([-40.0, -1e-3]), np.array([0.0, 0.0])]
    conv_weight, a, dt = (values.astype(np.float32) for values in weights)
    reference, kernel = DeltaReference(linear, conv_weight, a, dt), delta_step(1, linear, stride)
    conv = random.normal(size=(2, 1, 1, channels)).astype(np.float16)
    delta = random.normal(size=(2, 1, 2, 4, 8)).astype(np.float32)
    p = halves(random, 1, stride)
    p[0, channels + width :] = [-100, 100, 90, -30]
    expected = reference(p, conv[0], delta[0])
    y, control = np.empty((1, width), np.float32), np.array([0, 0, 2, 0], np.int32)
    kernels.run(kernel.launch, p, conv, delta, control, y, conv_weight, a, dt, np.zeros(kernel.counters, np.int32))
    np.testing.assert_allclose(y, expected[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(delta[1], expected[2], rtol=1e-4, atol=1e-6)
