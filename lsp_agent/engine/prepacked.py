"""Experts that page in as they are routed: packed for this machine's kernels, in a file that ONNX Runtime maps.

The CPU's `QMoE` packs its weights into memory of its own when a session is made, so memory and the time to load grow
with the model. ONNX Runtime can keep such packed weights in a file instead (`session.save_external_prepacked_constant_
initializers`), and maps them from there: an initialiser's external data then names, beside the weights themselves,
`prepacked_N` = "operator+hash|offset;length;0|...", the hash being that of the packed weights. At load it packs the
weights all the same, to compare that hash, and only then takes the file's in their place.

We keep the mechanism but not that cost. The weights an initialiser names here are a *stand-in*: a hole in the file, but
for a number that makes its hash unlike the others'; the hash beside the packed weights is the stand-in's. Of 4-bit
weights the stand-in is a single expert, because the packed weights bring their own shape along; of 8-bit weights ONNX
Runtime packs only those whose shape fits their scales, so there it has all experts. If a hash does not fit, the kernel
refuses the stand-in's shape; it never computes with it. The file is made one node at a time, and a node is only
accepted when it gives, bit for bit, what ONNX Runtime gives with the original weights.

Packed weights fit one kind of processor and one version of ONNX Runtime, so both are part of the file's name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnxruntime as ort
from filelock import FileLock
from onnx import ModelProto, NodeProto, TensorProto, helper, load_model

from lsp_agent import machine
from lsp_agent.engine.package import PAGE, WEIGHTS
from lsp_agent.errors import UserError

Progress = Callable[[int, int], None]

_VERSION = 1
_PREFIX = "prepacked-"
_TEMPORARY = ".prepacking-"
_DATA, _SAVED, _SAVED_DATA = "data.bin", "saved.onnx", "saved.bin"
_WEIGHT_INPUTS = (2, 5)
"""Which of `QMoE`'s inputs are weights: those of the first and of the second projection."""
_ROUTER_WEIGHTS = 14
_COPY_BYTES = 1 << 24
_SAMPLES = 4
"""Pages of each packed tensor whose checksum is compared at load; comparing all would read the whole file."""
_CPU_FIELDS = {"vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part"}
_ENVIRONMENT = ("ORT_QMOE_CPU_QNBIT_GEMM", "ORT_USE_MLAS_Q4_GEMM_MOE")
"""Variables that change what ONNX Runtime packs."""

_log = logging.getLogger(__name__)


class _DifferentResultError(Exception):
    """A node computes something else with the prepacked file than with the weights themselves."""


@dataclass(frozen=True)
class _Packed:
    """One weight in the file: `blobs` are [offset, bytes], `key` is ONNX Runtime's "operator+hash" of the stand-in."""

    shape: list[int]
    stand_in: list[int]
    key: str
    blobs: list[list[int]]

    def describe(self, tensor: TensorProto, location: str) -> None:
        """Make `tensor` refer to this weight in the file `location`."""
        offset, length = self.stand_in
        tensor.dims[:] = self.shape
        entry = "|".join([self.key, *(f"{start};{size};0" for start, size in self.blobs)]) if self.key else ""
        _external(tensor, location, offset, length, {"prepacked_0": entry} if entry else {})


def page_experts_in(model: ModelProto, folder: Path, on_progress: Progress | None = None) -> None:
    """Let the routed experts of `model`, a graph over the package `folder`, page in from its prepacked file.

    Makes the file first if this machine has none yet: a node at a time, with the memory of one node's packed experts
    (1.2 GB for 512 experts of 2048 x 512 x 3 in 4 bits); `on_progress(done, total)` counts nodes. Where that cannot be
    done, the graph stays as it is if the packed experts fit into memory. Raises `UserError` if they do not.
    """
    nodes = [node for node in model.graph.node if node.op_type == "QMoE"]
    if not nodes:
        return
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    name = _PREFIX + _key(nodes, tensors, folder)
    packed = _read(folder, name)
    if packed is None:
        try:
            packed = _make_locked(nodes, tensors, folder, name, on_progress)
        except (OSError, _DifferentResultError) as error:
            _do_without(nodes, tensors, folder, error)
            return
    for weight, entry in packed.items():
        entry.describe(tensors[weight], f"{name}.bin")


def _weights(node: NodeProto) -> list[str]:
    return [node.input[index] for index in _WEIGHT_INPUTS]


def _length(tensor: TensorProto) -> int:
    return int(next(entry.value for entry in tensor.external_data if entry.key == "length"))


def _external(tensor: TensorProto, location: str, offset: int, length: int, more: dict[str, str]) -> None:
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length, **more}.items():
        item = tensor.external_data.add()
        item.key, item.value = key, str(value)


def _key(nodes: list[NodeProto], tensors: dict[str, TensorProto], folder: Path) -> str:
    """What the packed weights depend on: the processor, ONNX Runtime, the nodes, and the file the weights are in."""
    weights = (folder / WEIGHTS).stat()
    parts: list[Any] = [_VERSION, ort.__version__, _processor(), weights.st_size, weights.st_mtime_ns]
    parts += [os.environ.get(variable) for variable in _ENVIRONMENT]
    for node in nodes:
        # Names of values are numbered through the graph, so only attributes and weights are compared.
        parts += [sorted(str(attribute) for attribute in node.attribute), len(node.input)]
        parts += [str(tensors[name]) for name in node.input if name in tensors]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """The processor and its instruction sets."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    lines = (line.partition(":") for line in first.splitlines())
    found = sorted((key.strip(), value.strip()) for key, _, value in lines if key.strip() in _CPU_FIELDS)
    return json.dumps([platform.machine(), *found])


def _read(folder: Path, name: str) -> dict[str, _Packed] | None:
    """The weights of a complete file that nobody wrote to since it was made; None if there is none.

    A change in place shows in the time of the file's last change, a failing disk only if it hits a sampled page.
    """
    path = folder / f"{name}.bin"
    try:
        index = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        content, found = index["content"], path.stat()
        if index["sha256"] != _digest(content):
            return None
        if [found.st_size, found.st_mtime_ns] != [content["size"], content["mtime_ns"]]:
            return None
        with path.open("rb") as file:
            for offset, checksum in content["samples"]:
                if _checksum(file, offset) != checksum:
                    return None
        return {weight: _Packed(**entry) for weight, entry in content["weights"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum(file: IO[bytes], offset: int) -> int:
    file.seek(offset)
    return zlib.crc32(file.read(PAGE))


def _make_locked(
    nodes: list[NodeProto], tensors: dict[str, TensorProto], folder: Path, name: str, on_progress: Progress | None
) -> dict[str, _Packed]:
    """Make the file unless another process just did; the index appears last, by a rename."""
    with FileLock(folder / ".prepacked.lock", mode=0o600):
        if (packed := _read(folder, name)) is not None:
            return packed
        for left in folder.glob(f"{_TEMPORARY}*"):  # of a process that was killed: the lock is ours
            shutil.rmtree(left, ignore_errors=True)
        for old in folder.glob(f"{_PREFIX}*"):  # of another processor, version or state of the weights
            old.unlink()
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as temporary:
            work = Path(temporary)
            packed = _make(nodes, tensors, folder, work, on_progress)
            data = work / _DATA
            content = {
                "size": data.stat().st_size,
                "mtime_ns": data.stat().st_mtime_ns,
                "samples": _samples(data, packed),
                "weights": {weight: vars(entry) for weight, entry in packed.items()},
            }
            index = work / "index.json"
            index.write_text(json.dumps({"content": content, "sha256": _digest(content)}), encoding="utf-8")
            data.replace(folder / f"{name}.bin")
            index.replace(folder / f"{name}.json")
        return packed


def _samples(data: Path, packed: dict[str, _Packed]) -> list[list[int]]:
    with data.open("rb") as file:
        pages = [
            start + size * sample // _SAMPLES // PAGE * PAGE
            for entry in packed.values()
            for start, size in entry.blobs
            for sample in range(_SAMPLES)
        ]
        return [[offset, _checksum(file, offset)] for offset in pages]


def _make(
    nodes: list[NodeProto],
    tensors: dict[str, TensorProto],
    folder: Path,
    work: Path,
    on_progress: Progress | None,
) -> dict[str, _Packed]:
    packed: dict[str, _Packed] = {}
    codes = [sum(_length(tensors[name]) for name in _weights(node)) for node in nodes]
    with (work / _DATA).open("w+b") as data:
        for index, node in enumerate(nodes):
            # The saved model holds codes, scales and packed weights of one node besides the file itself. How large
            # packed weights are is known after the first node; 3 codes for one is the largest form there is.
            growth = data.tell() / sum(codes[:index]) if index else 3.0
            _check_free(folder, int(growth * sum(codes[index:]) + (2 + growth) * codes[index]))
            packed |= _make_node(node, tensors, folder, work, data)
            if on_progress is not None:
                on_progress(index + 1, len(nodes))
            _log.info("packed the experts of layer %d of %d for this machine", index + 1, len(nodes))
        data.truncate(-(-data.tell() // PAGE) * PAGE)
        data.flush()
        os.fsync(data.fileno())
    return packed


def _check_free(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{needed / 1e9:.1f} GB of free disk are needed and {free / 1e9:.1f} GB are there")


def _make_node(
    node: NodeProto, tensors: dict[str, TensorProto], folder: Path, work: Path, data: IO[bytes]
) -> dict[str, _Packed]:
    own = {name: tensors[name] for name in node.input if name in tensors}
    graph = _single(node, own)
    session, saved = _save(graph, folder, work)
    feeds = _feeds(session)
    expected = session.run(None, feeds)[0]
    del session  # and with it the packed weights in memory
    if not all(name in saved for name in _weights(node)):
        raise _DifferentResultError("ONNX Runtime keeps the experts of this machine's kernel in no file")
    blobs = {name: _copy_blobs(saved[name][1], work / _SAVED_DATA, data) for name in _weights(node)}
    location = f"{work.name}/{_DATA}"
    shapes, spans = {}, {}
    for name in _weights(node):
        shapes[name], spans[name] = _write_stand_in(tensors[name], node, data, blobs[name][0][0])
        _Packed(shapes[name], spans[name], "", []).describe(own[name], location)
    data.flush()
    _, saved = _save(_single(node, own), folder, work)
    if not all(name in saved for name in _weights(node)):
        raise _DifferentResultError("ONNX Runtime does not pack a stand-in")
    keys = {name: saved[name][0] for name in _weights(node)}
    packed = {name: _Packed(shapes[name], spans[name], keys[name], blobs[name]) for name in _weights(node)}
    for name, entry in packed.items():
        entry.describe(own[name], location)
    session = ort.InferenceSession(_single(node, own), _options(folder), providers=["CPUExecutionProvider"])
    if not np.array_equal(session.run(None, feeds)[0], expected, equal_nan=True):
        raise _DifferentResultError("ONNX Runtime computes something else with prepacked experts")
    return packed


def _single(node: NodeProto, own: dict[str, TensorProto]) -> bytes:
    """A model of one `QMoE`: its activations and router are inputs. Copies the tensors in `own` into itself."""
    for name in own:
        own[name] = TensorProto.FromString(own[name].SerializeToString())
    first = own[node.input[_WEIGHT_INPUTS[0]]]
    scales = own[node.input[3]]
    bits = next(attribute.i for attribute in node.attribute if attribute.name == "expert_weight_bits")
    hidden, experts = first.dims[2] * 8 // bits, scales.dims[0]
    widths = {node.input[0]: hidden, node.input[1]: experts}
    if len(node.input) > _ROUTER_WEIGHTS and node.input[_ROUTER_WEIGHTS]:
        widths[node.input[_ROUTER_WEIGHTS]] = experts
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in widths.items()]
    outputs = [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["n", hidden])]
    graph = helper.make_graph([node], "experts", inputs, outputs, list(own.values()))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    serialised: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return serialised


def _feeds(session: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Two rows of random activations and a softmax over random logits, which serve as logits, too."""
    random = np.random.default_rng(0)
    feeds = {}
    for index, value in enumerate(session.get_inputs()):
        rows = random.standard_normal((2, value.shape[1]), dtype=np.float32)
        feeds[value.name] = rows if index == 0 else np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
    return feeds


def _options(folder: Path) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # the order of sums depends on the number of threads
    options.log_severity_level = 3  # it warns that what it saves fits this machine only
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


def _save(
    model: bytes, folder: Path, work: Path
) -> tuple[ort.InferenceSession, dict[str, tuple[str, list[list[int]]]]]:
    """A session of `model`, and (key, blobs in `_SAVED_DATA`) of each weight that ONNX Runtime saves prepacked."""
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
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found = {}
    for tensor in load_model(str(work / _SAVED), load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "prepacked_0":
                key, *blobs = entry.value.split("|")
                found[tensor.name] = key, [[int(number) for number in blob.split(";")[:2]] for blob in blobs]
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
                left -= data.write(saved.read(min(left, _COPY_BYTES)))
            copied.append([offset, size])
    return copied


def _write_stand_in(tensor: TensorProto, node: NodeProto, data: IO[bytes], number: int) -> tuple[list[int], list[int]]:
    """Shape and [offset, bytes] of a stand-in that no other weight shares; `number` is unlike the others'."""
    bits = next(attribute.i for attribute in node.attribute if attribute.name == "expert_weight_bits")
    shape = list(tensor.dims) if bits == 8 else [1, *tensor.dims[1:]]
    size = int(np.prod(shape))
    offset = _next_page(data)
    data.write((number // PAGE + 1).to_bytes(8, "little"))
    data.truncate(offset + size)  # a hole: no space on disk, and read as zeros
    data.seek(0, os.SEEK_END)
    return shape, [offset, size]


def _do_without(nodes: list[NodeProto], tensors: dict[str, TensorProto], folder: Path, error: Exception) -> None:
    needed = 2 * sum(_length(tensors[name]) for node in nodes for name in _weights(node))
    if needed > machine.usable_memory():
        raise UserError(
            f"The experts of {folder.name} must be packed for this machine into a file in {folder}, which failed "
            f"({error}); free space there or choose a smaller model."
        ) from error
    _log.warning("%s: no prepacked experts (%s); all of them are kept in memory", folder.name, error)
