"""Experts that page in as they are routed: packed for this machine's kernels, in a file that ONNX Runtime maps.

The CPU's `QMoE` packs its weights into memory of its own when a session is made, so memory and the time to load grow
with the model. Here they are packed once, node by node (`expert_packing.py`), into `prepacked-KEY.bin` in the package's
folder, which is mapped: what is routed becomes resident, and the system may drop it again. Packed weights fit one kind
of processor and one version of ONNX Runtime, so both are part of the key. `prepacked-KEY.json` says where each weight
lies; it appears last, so a file without it counts for nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import mmap
import os
import platform
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import onnxruntime as ort
from filelock import FileLock, Timeout
from onnx import ModelProto, NodeProto, TensorProto

from lsp_agent import machine
from lsp_agent.engine.expert_packing import DATA, PackedTensor, PackingError, pack_node, packed_bytes, weights_of
from lsp_agent.engine.package import PAGE, WEIGHTS
from lsp_agent.errors import UserError

Progress = Callable[[int, int], None]

_VERSION = 2
_PREFIX = "prepacked-"
_TEMPORARY = ".prepacking-"
_LOCK = ".prepacked.lock"
_LOCK_POLL_S = 1.0
_HUGE_PAGE = 1 << 21
_SAMPLES = 4
"""Pages of each packed tensor whose checksum is compared at load; comparing all would read the whole file."""
_CPU_FIELDS = {"vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU implementer", "CPU part"}
_ENVIRONMENT = ("ORT_QMOE_CPU_QNBIT_GEMM", "ORT_USE_MLAS_Q4_GEMM_MOE")
"""Variables that change what ONNX Runtime packs."""

_log = logging.getLogger(__name__)


def page_experts_in(model: ModelProto, folder: Path, on_progress: Progress | None = None) -> Path | None:
    """Let the routed experts of `model`, a graph over the package `folder`, page in from its prepacked file.

    Makes the file first if this machine has none yet: a node at a time, with the memory of one node's packed experts
    (1.2 GB for 512 experts of 2048 x 512 x 3 in 4 bits); `on_progress(done, total)` counts nodes. Where that cannot be
    done, the graph stays as it is if the packed experts fit into memory. Raises `UserError` if they do not.
    Returns the file, if the model has routed experts that come from it.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    # Weights that the graph converts in memory (MXFP4 as 8 bits) are in no file that a session of one node could read.
    nodes = [
        node
        for node in model.graph.node
        if node.op_type == "QMoE" and all(_location(tensors[name]) == WEIGHTS for name in weights_of(node))
    ]
    if not nodes:
        return None
    name = _PREFIX + _key(nodes, tensors, folder)
    packed = _read(folder, name)
    if packed is None:
        try:
            packed = _make_locked(nodes, tensors, folder, name, on_progress)
        except (OSError, PackingError) as error:
            _do_without(nodes, tensors, folder, error)
            return None
    for weight, entry in packed.items():
        entry.describe(tensors[weight], f"{name}.bin")
    return folder / f"{name}.bin"


def read_in_huge_pages(file: Path) -> None:
    """Where the system reads more than a huge page around a fault, let it read one huge page of the mapped `file`.

    An expert has about 2 MB. With a read-ahead of 8 MB a fault reads five times what is needed and drops as much from
    a full memory; without any, an expert is read in hundreds of pieces. `MADV_HUGEPAGE` with `MADV_RANDOM` is the one
    size between that Linux offers.
    """
    try:
        device = file.stat().st_dev
        around = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text()
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        libc = ctypes.CDLL(None)
    except (OSError, AttributeError, TypeError):
        return
    if int(around) << 10 <= _HUGE_PAGE:
        return
    for line in maps:
        fields = line.split(maxsplit=5)
        if fields[5:] == [str(file.resolve())]:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            extent = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
            if libc.madvise(*extent, mmap.MADV_HUGEPAGE) == 0:
                libc.madvise(*extent, mmap.MADV_RANDOM)


def _location(tensor: TensorProto) -> str | None:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)


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


def _read(folder: Path, name: str) -> dict[str, PackedTensor] | None:
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
        return {weight: PackedTensor(**entry) for weight, entry in content["weights"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum(file: IO[bytes], offset: int) -> int:
    file.seek(offset)
    return zlib.crc32(file.read(PAGE))


def _make_locked(
    nodes: list[NodeProto], tensors: dict[str, TensorProto], folder: Path, name: str, on_progress: Progress | None
) -> dict[str, PackedTensor]:
    """Make the file unless another process just did; the index appears last, by a rename."""
    with _locked(folder, waiting=lambda: on_progress(0, len(nodes)) if on_progress else None):
        if (packed := _read(folder, name)) is not None:
            return packed
        for left in folder.glob(f"{_TEMPORARY}*"):  # of a process that was killed: the lock is ours
            shutil.rmtree(left, ignore_errors=True)
        for old in folder.glob(f"{_PREFIX}*"):  # of another processor, version or state of the weights
            old.unlink()
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as temporary:
            work = Path(temporary)
            packed = _make(nodes, tensors, folder, work, on_progress)
            data = work / DATA
            content = {
                "size": data.stat().st_size,
                "mtime_ns": data.stat().st_mtime_ns,
                "samples": _samples(data, packed),
                "weights": {weight: asdict(entry) for weight, entry in packed.items()},
            }
            index = work / "index.json"
            index.write_text(json.dumps({"content": content, "sha256": _digest(content)}), encoding="utf-8")
            data.replace(folder / f"{name}.bin")
            index.replace(folder / f"{name}.json")
        return packed


@contextmanager
def _locked(folder: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """One process at a time; `waiting` is called once a second while another is at work."""
    lock = FileLock(folder / _LOCK, timeout=_LOCK_POLL_S, mode=0o600)
    while not lock.is_locked:
        try:
            lock.acquire()
        except Timeout:
            waiting()
    try:
        yield
    finally:
        lock.release()


def _samples(data: Path, packed: dict[str, PackedTensor]) -> list[list[int]]:
    with data.open("rb") as file:
        pages = [
            start + size * sample // _SAMPLES // PAGE * PAGE
            for entry in packed.values()
            for start, size in entry.content
            for sample in range(_SAMPLES)
        ]
        return [[offset, _checksum(file, offset)] for offset in pages]


def _make(
    nodes: list[NodeProto],
    tensors: dict[str, TensorProto],
    folder: Path,
    work: Path,
    on_progress: Progress | None,
) -> dict[str, PackedTensor]:
    packed: dict[str, PackedTensor] = {}
    sizes = [packed_bytes(node, tensors) for node in nodes]
    with (work / DATA).open("w+b") as data:
        for index, node in enumerate(nodes):
            # What ONNX Runtime saves of a node is what went into it and what is packed.
            _check_free(folder, sum(sizes[index:]) + 2 * sizes[index])
            packed |= pack_node(node, tensors, folder, work, data)
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


def _do_without(nodes: list[NodeProto], tensors: dict[str, TensorProto], folder: Path, error: Exception) -> None:
    needed = sum(packed_bytes(node, tensors) for node in nodes)
    if needed > machine.usable_memory():
        raise UserError(
            f"The experts of {folder.name} must be packed for this machine into a file in {folder}, which failed "
            f"({error}); free space there or choose a smaller model."
        ) from error
    _log.warning("%s: no prepacked experts (%s); all of them are kept in memory", folder.name, error)
