"""The kernels of Gated DeltaNet's and attention's steps, emulated, against ONNX Runtime's operators and NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import emulator
import numpy as np
import onnxruntime as ort
import pytest
from emulator import EmulatedKernels
from onnx import TensorProto, helper, numpy_helper

from lsp_agent.engine.architecture import CONTRIB, LinearAttentionConfig
from lsp_agent.engine.cpu_graph import L2_EPSILON
from lsp_agent.engine.gpu.sequence_kernels import append_tokens, attention_step, delta_step


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


@pytest.mark.parametrize(
    ("case", "rows", "count"), [("small", 3, 2), ("a value head each", 8, 8), ("one block a head", 2, 2)]
)
def test_delta_step_of_several_rows_is_one_after_another(
    case: str, rows: int, count: int, kernels: EmulatedKernels
) -> None:
    """In the emulator to the last bit, and the state after each row that counts is in a place of its own."""
    batch, _, linear, tuning = DELTA[case]
    random = np.random.default_rng(5)
    ring, turn = rows + 1, rows - 1
    width = linear.value_heads * linear.value_size
    channels = 2 * linear.key_heads * linear.key_size + width
    stride = channels + width + 2 * linear.value_heads + 3
    constants = [
        random.normal(size=(channels, 1, linear.kernel)).astype(np.float32),
        -np.exp(random.normal(size=linear.value_heads)).astype(np.float32),
        random.normal(size=linear.value_heads).astype(np.float32),
        np.zeros(delta_step(batch, linear, stride, **tuning).counters, np.int32),
    ]
    conv_ring = random.normal(size=(ring, batch, linear.kernel - 1, channels)).astype(np.float16)
    shape = (ring, batch, linear.value_heads, linear.value_size, linear.key_size)
    delta_ring = random.normal(size=shape).astype(np.float32)
    p = halves(random, batch, rows, stride) * 3
    expected = conv_ring.copy(), delta_ring.copy()
    single = delta_step(batch, linear, stride, **tuning).launch
    y, wanted = np.full((2, batch, rows, width), np.nan, np.float32)
    for row in range(rows):
        control, one = np.array([(turn + row) % ring, 0, ring, 0], np.int32), np.empty((batch, width), np.float32)
        before = conv_ring.copy(), delta_ring.copy()
        kernels.run(single, np.ascontiguousarray(p[:, row]), *expected, control, one, *constants)
        wanted[:, row] = one
    for row in range(count, rows):  # what does not count leaves the rings as they are
        place = (turn + row + 1) % ring
        expected[0][place], expected[1][place] = before[0][place], before[1][place]
    several = delta_step(batch, linear, stride, rows, **tuning).launch
    control = np.array([turn, 0, ring, count], np.int32)
    kernels.run(several, p, conv_ring, delta_ring, control, y, *constants)
    np.testing.assert_array_equal(conv_ring, expected[0])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if emulator.ON_GPU else {"rtol": 0}  # its compiler fuses as it likes
    np.testing.assert_allclose(y, wanted, **tolerance)
    np.testing.assert_allclose(delta_ring, expected[1], **tolerance)


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


def rotated(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    """`x` [heads, head size] with its first 2 * len(cosines) elements rotated, halves as pairs."""
    half = len(cosines)
    first, second = x[:, :half], x[:, half : 2 * half]
    parts = [first * cosines - second * sines, second * cosines + first * sines, x[:, 2 * half :]]
    return np.concatenate(parts, axis=1)


@dataclass
class AttentionCase:
    """A layer and its caches; `reference` is plain softmax attention in fp64."""

    heads: int
    kv_heads: int
    size: int
    rotary: int
    positions: Sequence[int]
    gate: bool = False
    normed: bool = False
    capacity: int = 300
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        random = np.random.default_rng(11)
        batch = len(self.positions)
        self.query_width = self.heads * self.size * (2 if self.gate else 1)
        self.stride = self.query_width + 2 * self.kv_heads * self.size + 6  # even: pairs are loaded
        self.p = random.normal(size=(batch, self.stride)).astype(np.float32)
        shape = (batch, self.kv_heads, self.capacity, self.size)
        self.key_cache, self.value_cache = (random.normal(size=shape).astype(np.float16) for _ in range(2))
        for sequence, position in enumerate(self.positions):
            for cache in (self.key_cache, self.value_cache):
                cache[sequence, :, position:] = np.nan  # what no token has written yet must not be read
        # Some keys matter more than all others: the highest score moves from stretch to stretch.
        self.key_cache[:, :, 5::37] *= 4
        self.norms = [random.normal(size=self.size).astype(np.float32) for _ in range(2)] if self.normed else [None] * 2
        angles = random.uniform(0, 2 * np.pi, (self.capacity, self.rotary // 2))
        self.cosines, self.sines = np.cos(angles).astype(np.float16), np.sin(angles).astype(np.float16)

    def reference(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """y [batch, heads * head size], and both caches with the new token."""
        keys, values = self.key_cache.copy(), self.value_cache.copy()
        rows = []
        for sequence, position in enumerate(self.positions):
            p = self.p[sequence].astype(np.float64)
            query = p[: self.query_width].reshape(self.heads, -1)[:, : self.size]
            kv = p[self.query_width :][: 2 * self.kv_heads * self.size]
            key, value = kv.reshape(2, self.kv_heads, self.size)
            turned = []
            for x, norm in zip((query, key), self.norms, strict=True):
                if norm is not None:
                    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + self.epsilon) * norm
                turned.append(rotated(x, self.cosines[position], self.sines[position]))
            keys[sequence, :, position], values[sequence, :, position] = turned[1], value
            group = self.heads // self.kv_heads
            seen = slice(0, position + 1)
            k, v = (np.repeat(c[sequence, :, seen].astype(np.float64), group, axis=0) for c in (keys, values))
            # For the tensor cores queries are rounded to fp16, as they are scaled for scores to the base of two.
            query = (turned[0] / (math.sqrt(self.size) * math.log(2))).astype(np.float16).astype(np.float64)
            scores = np.einsum("hd,htd->ht", query, k) * math.log(2)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            rows.append(np.einsum("ht,htd->hd", weights / weights.sum(axis=1, keepdims=True), v).ravel())
        return np.stack(rows), keys, values

    def run(self, kernels: EmulatedKernels, **tuning: int) -> None:
        """Run the kernel twice (the second time it finds its own token and counters) and compare."""
        expected, keys, values = self.reference()
        batch = len(self.positions)
        epsilon = self.epsilon if self.normed else None
        kernel = attention_step(
            batch, self.heads, self.kv_heads, self.size, self.rotary, self.stride, self.gate, epsilon, **tuning
        )
        lengths, control = np.array(self.positions, np.int32), np.array([1, self.capacity, 3, 0], np.int32)
        counters = np.zeros(kernel.counters, np.int32)
        for _ in range(2):
            y = np.full((batch, self.heads * self.size), np.nan, np.float32)
            scratch = np.full(kernel.scratch, np.nan, np.float32)
            constants = (*self.norms, self.cosines, self.sines, counters)
            state = (self.key_cache, self.value_cache, lengths, control)
            kernels.run(kernel.launch, self.p, *state, y, scratch, *constants)
            np.testing.assert_allclose(y, expected, rtol=2e-3, atol=1e-3)
            np.testing.assert_allclose(self.key_cache, keys, rtol=1e-3, atol=1e-6)
            np.testing.assert_array_equal(self.value_cache, values)
            assert not counters.any()


ATTENTION = {
    "first token": (AttentionCase(4, 2, 64, 64, [0]), {}),
    "one stretch": (AttentionCase(4, 2, 64, 64, [200], normed=True), {}),
    "gate, norms, part of a head rotated": (
        AttentionCase(16, 2, 256, 64, [70], gate=True, normed=True, capacity=80),
        {"splits": 4, "threads": 64, "least": 8},
    ),
    "a group of seven": (AttentionCase(14, 2, 64, 64, [299]), {"splits": 7, "threads": 64, "least": 32}),
    "one query head for each key head": (AttentionCase(3, 3, 128, 128, [90]), {"splits": 5, "threads": 32, "least": 8}),
    "a group of twelve in two parts": (
        AttentionCase(12, 1, 128, 128, [130], normed=True),
        {"splits": 6, "threads": 64, "least": 16},
    ),
    "a group in unequal parts": (AttentionCase(9, 1, 64, 16, [50]), {"splits": 2, "threads": 32, "least": 32}),
    "a group of sixteen": (AttentionCase(16, 1, 64, 32, [65]), {"splits": 2, "threads": 64, "least": 32}),
    "sequences of different lengths": (
        AttentionCase(4, 2, 64, 64, [0, 31, 32, 33, 191, 192, 255], gate=True),
        {"splits": 6, "threads": 64, "least": 32},
    ),
    "more results than are read at a time": (
        AttentionCase(2, 1, 128, 128, [299], normed=True),
        {"splits": 40, "threads": 32, "least": 8},
    ),
    "heads of no power of two": (AttentionCase(4, 2, 192, 96, [100]), {"splits": 3}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_step_is_softmax_attention(name: str, kernels: EmulatedKernels) -> None:
    case, tuning = ATTENTION[name]
    replace(case).run(kernels, **tuning)


@pytest.mark.parametrize("position", [*range(60, 70)])
def test_attention_step_puts_the_new_token_anywhere_in_a_stretch(position: int, kernels: EmulatedKernels) -> None:
    AttentionCase(2, 1, 64, 32, [position], capacity=71).run(kernels, splits=3, threads=32, least=32)


@pytest.mark.parametrize(
    ("case", "rows", "count", "tuning"),
    [
        (AttentionCase(4, 2, 64, 32, [0, 130], normed=True), 3, 3, {"splits": 3, "threads": 32, "least": 32}),
        (AttentionCase(16, 2, 256, 64, [60], True, True, capacity=65), 8, 5, {"splits": 3, "threads": 64, "least": 32}),
        (AttentionCase(12, 1, 128, 128, [30]), 2, 2, {}),
    ],
    ids=["stretches", "filled up", "two parts"],
)
def test_attention_of_several_rows_sees_the_rows_before(
    case: AttentionCase, rows: int, count: int, tuning: dict[str, int], kernels: EmulatedKernels
) -> None:
    """Each row as a step of its own after those before it; what does not count is appended nowhere."""
    case = replace(case)
    batch, random = len(case.positions), np.random.default_rng(2)
    p = random.normal(size=(batch, rows, case.stride)).astype(np.float32)
    found = case.key_cache.copy(), case.value_cache.copy()
    expected = []
    for row in range(count):
        one = replace(case, positions=[position + row for position in case.positions])
        one.p, one.norms, one.cosines, one.sines = p[:, row], case.norms, case.cosines, case.sines
        one.key_cache, one.value_cache = case.key_cache, case.value_cache
        y, case.key_cache, case.value_cache = one.reference()
        expected.append(y)
    sizes = (batch, case.heads, case.kv_heads, case.size, case.rotary, case.stride, case.gate)
    epsilon = case.epsilon if case.normed else None
    kernel = attention_step(*sizes, epsilon, rows, **tuning)
    ahead = np.minimum(np.arange(rows), count - 1)
    lengths = (np.array(case.positions)[:, None] + ahead).astype(np.int32)
    control, appended = np.array([1, case.capacity, 9, count], np.int32), np.ones(1, np.int32)
    counters, scratch = np.zeros(kernel.counters, np.int32), np.full(kernel.scratch, np.nan, np.float32)
    rotary = case.cosines, case.sines
    y = np.full((batch, rows, case.heads * case.size), np.nan, np.float32)
    inputs = (p, *found, lengths, control)
    kernels.run(append_tokens(*sizes, epsilon, rows), *inputs, appended, case.norms[1], *rotary)
    np.testing.assert_allclose(found[0], case.key_cache, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(found[1], case.value_cache)
    kernels.run(kernel.launch, *inputs, appended, y, scratch, *case.norms, *rotary, counters)
    np.testing.assert_allclose(y[:, :count], np.stack(expected, 1), rtol=2e-3, atol=1e-3)
    assert np.isfinite(y).all() and not counters.any()


def test_sizes_that_no_kernel_covers_are_refused() -> None:
    with pytest.raises(ValueError, match="does not cover"):
        attention_step(1, 4, 2, 96, 96, 1000)
    with pytest.raises(ValueError, match="does not cover"):
        attention_step(1, 5, 2, 64, 64, 1000)
    with pytest.raises(ValueError, match="does not cover"):
        delta_step(1, replace(SMALL, key_size=10), 1000)
