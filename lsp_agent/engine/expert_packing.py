"""Packs the weights of one `QMoE` as ONNX Runtime's CPU kernel does, into a file that it maps instead of its own copy.

ONNX Runtime can keep packed weights in a file (`session.save_external_prepacked_constant_initializers`): an
initialiser's external data then names, beside the weights themselves, `prepacked_N` = "operator+hash|offset;length;0|
...", the hash being that of the packed weights. At load it packs the weights all the same, to compare that hash, and
only then maps the file's in their place: memory no longer grows with the model, the time to load still does.

So the weights that an initialiser names here are a *stand-in*: a hole in the file, but for a number that makes its hash
unlike the others'; the hash beside the packed weights is the stand-in's. Of 4-bit weights the stand-in is a single
expert, because the packed weights bring their own shape along; of 8-bit weights ONNX Runtime packs only those whose
shape fits their scales, so there it has all experts and is packed at every load. If a hash does not fit, the kernel
refuses the stand-in's shape and never computes with it (4 bits); a node is only accepted when it gives, bit for bit,
what it gives with the original weights.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, load_model

from lsp_agent.engine.graph import CONTRIB, IR_VERSION, OPSET
from lsp_agent.engine.package import PAGE

DATA = "data.bin"
_SAVED, _SAVED_DATA = "saved.onnx", "saved.bin"
_WEIGHT_INPUTS = (2, 5)
"""Which of `QMoE`'s inputs are weights: those of the first and of the second projection."""
_SCALE_INPUTS = (3, 6)
_ROUTER_WEIGHTS = 14
_COPY_BYTES = 1 << 24


class PackingError(Exception):
    """ONNX Runtime does not keep packed weights in a file, or computes something else with them."""


@dataclass(frozen=True)
class PackedTensor:
    """An initialiser in the file: the array at `extent`, [offset, bytes], of the shape `shape` and ONNX's type `type`.

    Of weights the array is the stand-in, `key` ONNX Runtime's "operator+hash" of it, and `blobs` are the extents of
    what is packed.
    """

    type: int
    shape: list[int]
    extent: list[int]
    key: str = ""
    blobs: list[list[int]] = field(default_factory=list)

    def describe(self, tensor: TensorProto, location: str) -> None:
        """Make `tensor` refer to this one in the file `location`."""
        tensor.dims[:] = self.shape
        tensor.data_type = self.type
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": location, "offset": self.extent[0], "length": self.extent[1]}
        if self.key:
            entries["prepacked_0"] = "|".join([self.key, *(f"{start};{size};0" for start, size in self.blobs)])
        del tensor.external_data[:]
        for key, value in entries.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)

    @property
    def content(self) -> list[list[int]]:
        """Extents that are not holes."""
        return self.blobs or [self.extent]


def weights_of(node: NodeProto) -> list[str]:
    """Names of the weights of a `QMoE`."""
    return [node.input[index] for index in _WEIGHT_INPUTS]


def packed_bytes(node: NodeProto, tensors: dict[str, TensorProto]) -> int:
    """What the file will hold of a `QMoE`: codes, scales and sums of blocks, as the fast kernels want them."""
    codes = sum(math.prod(tensors[name].dims) for name in weights_of(node))
    scales = [tensors[node.input[index]] for index in _SCALE_INPUTS]
    return codes + sum(math.prod(t.dims) * 4 * (2 if t.data_type == TensorProto.FLOAT else 3) for t in scales)


def pack_node(
    node: NodeProto, tensors: dict[str, TensorProto], folder: Path, work: Path, data: IO[bytes]
) -> dict[str, PackedTensor]:
    """Append the weights of a `QMoE`, packed, to `data`, which is the file `DATA` of `work`, a folder in `folder`.

    `tensors` are the graph's initialisers, whose data lies in files of `folder`. Raises `PackingError`, and `OSError`
    when the disk is full.
    """
    own = {name: TensorProto.FromString(tensors[name].SerializeToString()) for name in node.input if name in tensors}
    bits = next(attribute.i for attribute in node.attribute if attribute.name == "expert_weight_bits")
    inputs = _inputs(node, own, bits)
    names, location = weights_of(node), f"{work.name}/{DATA}"
    session, saved = _save(_single(node, own, inputs), folder, work, names)
    feeds = _feeds(inputs)
    expected = session.run(None, feeds)[0]
    del session  # and with it the packed weights in memory
    blobs = {name: _copy_blobs(saved[name][1], work / _SAVED_DATA, data) for name in names}
    packed = _widen_scales(node, own, folder, data)
    for name in names:
        shape = list(own[name].dims) if bits == 8 else [1, *own[name].dims[1:]]
        packed[name] = PackedTensor(own[name].data_type, shape, _write_stand_in(math.prod(shape), data))
    _describe(packed, own, location)
    data.flush()
    _, saved = _save(_single(node, own, inputs), folder, work, names)
    packed |= {name: replace(packed[name], key=saved[name][0], blobs=blobs[name]) for name in names}
    _describe(packed, own, location)
    session = _session(_single(node, own, inputs), _options(folder))
    if not np.array_equal(session.run(None, feeds)[0], expected, equal_nan=True):
        raise PackingError("ONNX Runtime computes something else with prepacked experts")
    return packed


def _describe(packed: dict[str, PackedTensor], own: dict[str, TensorProto], location: str) -> None:
    for name, tensor in packed.items():
        tensor.describe(own[name], location)


def _widen_scales(
    node: NodeProto, own: dict[str, TensorProto], folder: Path, data: IO[bytes]
) -> dict[str, PackedTensor]:
    """Append 16-bit scales in fp32: ONNX Runtime would convert them at load and keep those of all experts in memory."""
    widened = {}
    for name in (node.input[index] for index in _SCALE_INPUTS):
        tensor = own[name]
        if tensor.data_type == TensorProto.FLOAT:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        stored = np.memmap(folder / place["location"], kind, "r", int(place["offset"]), tuple(tensor.dims))
        offset = _next_page(data)
        for expert in stored:
            data.write(expert.astype(np.float32).tobytes())
        widened[name] = PackedTensor(TensorProto.FLOAT, list(tensor.dims), [offset, 4 * stored.size])
    return widened


def _inputs(node: NodeProto, own: dict[str, TensorProto], bits: int) -> dict[str, int]:
    """Widths of activations, router logits and, if the node takes them, router weights."""
    widths = {
        node.input[0]: own[weights_of(node)[0]].dims[2] * 8 // bits,
        node.input[1]: own[node.input[_SCALE_INPUTS[0]]].dims[0],
    }
    if len(node.input) > _ROUTER_WEIGHTS and node.input[_ROUTER_WEIGHTS]:
        widths[node.input[_ROUTER_WEIGHTS]] = widths[node.input[1]]
    return widths


def _feeds(inputs: dict[str, int]) -> dict[str, np.ndarray]:
    """Two rows of random activations; logits and router weights are a softmax."""
    random = np.random.default_rng(0)
    feeds = {}
    for index, (name, width) in enumerate(inputs.items()):
        rows = random.standard_normal((2, width), dtype=np.float32)
        feeds[name] = rows if index == 0 else np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
    return feeds


def _single(node: NodeProto, own: dict[str, TensorProto], inputs: dict[str, int]) -> bytes:
    """A model of this node alone."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in inputs.items()]
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["n", inputs[node.input[0]]])]
    graph = helper.make_graph([node], "experts", infos, outputs, list(own.values()))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
    serialised: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
    return serialised


def _options(folder: Path) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # the order of sums depends on the number of threads
    options.log_severity_level = 3  # it warns that what it saves fits this machine only
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


def _session(model: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT raises its own untyped errors
        raise PackingError(str(error)) from error


def _save(
    model: bytes, folder: Path, work: Path, names: list[str]
) -> tuple[ort.InferenceSession, dict[str, tuple[str, list[list[int]]]]]:
    """A session of `model`, and (key, blobs in `_SAVED_DATA`) of each of its weights `names`."""
    for file in (_SAVED, _SAVED_DATA):
        (work / file).unlink(missing_ok=True)
    options = _options(folder)
    options.optimized_model_filepath = str(work / _SAVED)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", _SAVED_DATA),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1"),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)
    session = _session(model, options)
    found = {}
    for tensor in load_model(str(work / _SAVED), load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "prepacked_0":
                key, *blobs = entry.value.split("|")
                found[tensor.name] = key, [[int(number) for number in blob.split(";")[:2]] for blob in blobs]
    if not all(name in found for name in names):
        raise PackingError("ONNX Runtime keeps the experts of this machine's kernel in no file")
    return session, found


def _next_page(data: IO[bytes]) -> int:
    # Kernels align what they packed within its memory, so that it works only at the alignment it was packed at.
    offset = -(-data.seek(0, os.SEEK_END) // PAGE) * PAGE
    data.truncate(offset)
    return data.seek(offset)


def _copy_blobs(blobs: list[list[int]], source: Path, data: IO[bytes]) -> list[list[int]]:
    copied = []
    with source.open("rb") as saved:
        for start, size in blobs:
            offset, left = _next_page(data), size
            saved.seek(start)
            while left:
                piece = saved.read(min(left, _COPY_BYTES))
                if not piece:
                    raise PackingError("ONNX Runtime saved less than it says")
                left -= data.write(piece)
            copied.append([offset, size])
    return copied


def _write_stand_in(size: int, data: IO[bytes]) -> list[int]:
    """[offset, bytes] of a stand-in that no other weight shares."""
    offset = _next_page(data)
    data.write((offset // PAGE + 1).to_bytes(8, "little"))
    data.truncate(offset + size)  # a hole: it takes no space on disk and is read as zeros
    data.seek(0, os.SEEK_END)
    return [offset, size]
