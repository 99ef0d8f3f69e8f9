"""One session for the experts of all layers while prompts are read.

ONNX Runtime's kernel for experts tries out all its tiles whenever a node of it sees another power of two of tokens, and
each node does so for itself: 7 s for the 48 layers of Qwen3-Coder-Next on an H100 with 2,048 tokens. So there is only
one node of each shape, in a session of its own, which gets the layers' weights as inputs; a layer calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

from lsp_agent.engine.device import CudaDevice, without_waiting
from lsp_agent.engine.gpu.host_call import HostCall
from lsp_agent.engine.gpu.operators import host_node
from lsp_agent.engine.gpu.weights import borrowed
from lsp_agent.engine.graph import CONTRIB, IR_VERSION, OPSET

FEWEST_TOKENS = 16
"""Runs of fewer are rare, and their search is short."""
_TOKENS, _LOGITS, _RESULT = "tokens", "logits", "result"


class SharedExperts:
    """Calls of the experts. `address` says where an array lies whose name is given; `device` is cpu or cuda.

    It must live as long as the sessions that its nodes are in, whose stream is that of `providers`.
    """

    def __init__(self, address: Callable[[str], int], device: str, providers: list[Any]) -> None:
        self._address, self._device, self._providers = address, device, providers
        self.sessions: dict[bytes, ort.InferenceSession] = {}
        self.layers: list[ExpertLayer] = []

    def node(
        self, inputs: Sequence[str], weights: Sequence[TensorProto | None], output: str, **attributes: Any
    ) -> NodeProto:
        """A node that computes the QMoE of `inputs` (tokens fp16 [..., hidden], the router's logits fp16 [tokens,
        experts]) and `weights`, in the operator's order, None for what is absent; the weights lie at their names'
        addresses, those of gate and up first, of down last. Its session must know our operators."""
        names = ["" if tensor is None else f"weight.{index}" for index, tensor in enumerate(weights)]
        there = {name: tensor for name, tensor in zip(names, weights, strict=True) if tensor is not None}
        count, hidden = there[names[0]].dims[0], there[names[-1]].dims[1]
        half, info = TensorProto.FLOAT16, helper.make_tensor_value_info
        given = [info(_TOKENS, half, ["tokens", hidden]), info(_LOGITS, half, ["tokens", count])]
        given += [info(name, tensor.data_type, list(tensor.dims)) for name, tensor in there.items()]
        layer = helper.make_node("QMoE", [_TOKENS, _LOGITS, *names], [_RESULT], domain=CONTRIB, **attributes)
        graph = helper.make_graph([layer], "experts", given, [info(_RESULT, half, ["tokens", hidden])])
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
        if model not in self.sessions:
            self.sessions[model] = ort.InferenceSession(model, providers=self._providers)
        bound = {
            name: borrowed(self._address(tensor.name), tensor.dims, tensor.data_type, self._device)
            for name, tensor in there.items()
        }
        self.layers.append(ExpertLayer(self.sessions[model], bound, self._device, hidden, count))
        return host_node(output, self.layers[-1].call.function, inputs, [(output, "h", (0, 0, 0))])

    def try_tiles(self, most: int, device: CudaDevice) -> None:
        """Let the kernels find their tiles for up to `most` tokens now, so that no prompt waits for it: 2 s on an H100
        for 2,048 tokens. `device` is where they run."""
        for session in self.sessions.values():
            layer = next(one for one in self.layers if one.session is session)
            x, result = (device.zeros((most, layer.hidden), "float16") for _ in range(2))
            logits = device.zeros((most, layer.count), "float16")
            tokens = most  # the largest first, whose memory the others use again
            while tokens >= FEWEST_TOKENS:
                layer.run(tokens, *map(device.address, (x, logits, result)))
                device.wait()
                tokens //= 2


class ExpertLayer:
    """The experts of one layer, and their function for `host_node`."""

    def __init__(
        self, session: ort.InferenceSession, weights: dict[str, ort.OrtValue], device: str, hidden: int, count: int
    ) -> None:
        self.session, self._weights, self._device = session, weights, device
        self.hidden, self.count = hidden, count
        self._binding = session.io_binding()
        for name, value in weights.items():
            self._binding.bind_ortvalue_input(name, value)
        self._options = without_waiting()
        self.call = HostCall(lambda rows, _, addresses: self.run(rows, *addresses), 3)

    def run(self, tokens: int, x: int, logits: int, result: int) -> None:
        """Queue the experts' work on tokens whose arrays are at these addresses."""
        rows = [tokens, self.hidden]
        self._binding.bind_input(_TOKENS, self._device, 0, np.float16, rows, x)
        self._binding.bind_input(_LOGITS, self._device, 0, np.float16, [tokens, self.count], logits)
        self._binding.bind_output(_RESULT, self._device, 0, np.float16, rows, result)
        self.session.run_with_iobinding(self._binding, self._options)
