"""The delta rule of long prompts by ONNX Runtime's engine that spreads a head over more of the GPU.

Its usual engine has a block for 64 values of each head, 64 for Qwen3-Coder-Next on the 132 processors of an H100; the
other prepares all chunks of a prompt at once and takes two thirds of the time (0.52 ms for 0.83 a layer of 2,048
tokens, as exact but for the state, which it carries in 16 bits from chunk to chunk). Which one a session has is said
when it is made, and this one cannot do prompts of one chunk: so there is a session of each, called by all layers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

from lsp_agent.engine.architecture import LinearAttentionConfig
from lsp_agent.engine.device import without_waiting
from lsp_agent.engine.gpu.host_call import HostCall
from lsp_agent.engine.gpu.operators import host_node
from lsp_agent.engine.graph import CONTRIB, IR_VERSION, OPSET

log = logging.getLogger(__name__)
DELTA_RULE: dict[str, Any] = {
    "update_rule": "gated_delta",
    "gate_activation": "qwen",
    "beta_activation": "sigmoid",
    "qk_l2_norm": 1,
}
"""GatedDeltaNet's attributes."""
CHUNK, HEAD = 64, 128
"""Tokens of a chunk, and the one size of heads that the engines in chunks know."""
_PLAN = "ORT_GDN_PLAN"


def covers(linear: LinearAttentionConfig) -> bool:
    """Whether the engine knows these sizes."""
    return linear.key_size == linear.value_size == HEAD


class SplitDelta:
    """Calls of the delta rule. `constant` keeps fp32 values by a name on the device, whose name is `device`.

    It must live as long as the sessions that its nodes are in, whose stream is that of `providers`.
    """

    def __init__(
        self,
        linear: LinearAttentionConfig,
        constant: Callable[[str, np.ndarray], int],
        device: str,
        providers: list[Any],
    ) -> None:
        self._linear, self._constant, self._device = linear, constant, device
        model = delta_model(linear)
        self.plain = ort.InferenceSession(model, providers=providers)
        before = os.environ.get(_PLAN)
        os.environ[_PLAN] = before or "chunked_split"
        try:
            self.split: ort.InferenceSession | None = ort.InferenceSession(model, providers=providers)
        finally:
            if before is None:
                del os.environ[_PLAN]
        self._calls: list[HostCall] = []

    def node(
        self, prefix: str, inputs: Sequence[str], outputs: Sequence[str], a_log: np.ndarray, dt: np.ndarray
    ) -> NodeProto:
        """Inputs: q, k, v h [batch, length, heads * head size], step, rate f32 [batch, length, value heads], the state
        before f32 [batch, value heads, value size, key size]; outputs: the result h like v, and the new state."""
        linear = self._linear
        gates = [self._constant(f"{prefix}.a_log", a_log), self._constant(f"{prefix}.dt", dt)]

        def run(rows: int, length: int, addresses: Sequence[int]) -> None:
            self._run(rows // length, length, [*addresses[:6], *gates, *addresses[6:]])

        self._calls.append(HostCall(run, 8))
        state = (0, linear.value_heads, linear.value_size, linear.key_size)
        made = [(outputs[0], "h", (0, 0, linear.value_heads * linear.value_size)), (outputs[1], "f", state)]
        return host_node(outputs[0], self._calls[-1].function, inputs, made)

    def _run(self, batch: int, length: int, addresses: Sequence[int]) -> None:
        if self.split is not None and length > CHUNK:
            try:
                self._run_in(self.split, batch, length, addresses)
                return
            except Exception as error:  # a GPU with too little shared memory for it
                log.info("prompts do without the split delta rule: %s", error)
                self.split = None
        self._run_in(self.plain, batch, length, addresses)

    def _run_in(self, session: ort.InferenceSession, batch: int, length: int, addresses: Sequence[int]) -> None:
        binding = session.io_binding()
        given, made = _values(self._linear, batch, length)
        for (name, kind, shape), address in zip(given, addresses, strict=False):
            binding.bind_input(name, self._device, 0, _NUMPY[kind], shape, address)
        for (name, kind, shape), address in zip(made, addresses[len(given) :], strict=True):
            binding.bind_output(name, self._device, 0, _NUMPY[kind], shape, address)
        session.run_with_iobinding(binding, without_waiting())


_NUMPY: dict[int, Any] = {TensorProto.FLOAT16: np.float16, TensorProto.FLOAT: np.float32}
_Value = tuple[str, int, list[Any]]


def _values(linear: LinearAttentionConfig, batch: Any, length: Any) -> tuple[list[_Value], list[_Value]]:
    """Names, types and shapes of the model's inputs and outputs."""
    half, single, heads = int(TensorProto.FLOAT16), int(TensorProto.FLOAT), linear.value_heads
    keys, values = [batch, length, linear.key_heads, linear.key_size], [batch, length, heads, linear.value_size]
    gates, state = [batch, length, heads], [batch, heads, linear.value_size, linear.key_size]
    given = [
        ("q", half, keys),
        ("k", half, keys),
        ("v", half, values),
        ("step", single, gates),
        ("rate", single, gates),
    ]
    given += [("past", single, state), ("a_log", single, [heads]), ("dt", single, [heads])]
    return given, [("y", half, values), ("present", single, state)]


def delta_model(linear: LinearAttentionConfig) -> bytes:
    """A model of the delta rule alone."""
    given, made = (
        [helper.make_tensor_value_info(*value) for value in part] for part in _values(linear, "batch", "length")
    )
    inputs = ["q", "k", "v", "", "step", "rate", "past", "a_log", "dt"]
    rule = helper.make_node("GatedDeltaNet", inputs, ["y", "present"], domain=CONTRIB, **DELTA_RULE)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    graph = helper.make_graph([rule], "delta", given, made)
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString())
