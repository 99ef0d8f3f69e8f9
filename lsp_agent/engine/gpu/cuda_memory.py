"""The GPU's memory and page-locked main memory, filled from files by several threads at the speed of the bus."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.gpu.compiler import CudaCompiler
from lsp_agent.engine.gpu.memory import ALIGNMENT, PIECE_BYTES, Load, Progress, Where, carry_all, view
from lsp_agent.engine.gpu.packing import pack_launch
from lsp_agent.errors import UserError

BLOCK_BYTES = 1 << 25
"""Small arrays are cut from blocks of this size; larger ones than half of it get memory of their own."""
STAGES = 2
"""Pieces that a thread has on their way at once: one is read from the file while the other crosses the bus."""
LOCKING_THREADS = 8
_COPY_DEFAULT = 4  # cudaMemcpyDefault: the addresses tell the direction


@dataclass
class _Stage:
    """A piece on its way: page-locked memory, if it is packed a copy on the device, and when both are free again."""

    locked: Any
    device: Any
    event: Any


class _Lane(threading.local):
    """What each thread has of its own."""

    stream: Any = None
    stages: tuple[_Stage, ...] = ()
    turn = 0


class CudaMemory:
    """See `Memory`. Main memory is locked in place, so that kernels read it over the bus by the same addresses."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._kept: list[Any] = []
        self._free, self._end = 0, 0
        self._compiler = CudaCompiler()

    def allocate(self, sizes: Sequence[int], where: Where = "device") -> list[int]:
        """See `Memory.allocate`."""
        try:
            if where == "device":
                return [self._on_device(nbytes) for nbytes in sizes]
            with ThreadPoolExecutor(LOCKING_THREADS) as pool:  # locking is the system's work, page by page
                locked = list(pool.map(self._cupy.cuda.PinnedMemory, sizes))
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            raise self._too_little(sum(sizes), where) from error
        self._kept += locked
        return [int(memory.ptr) for memory in locked]

    def _on_device(self, nbytes: int) -> int:
        nbytes = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if nbytes > BLOCK_BYTES // 2:
            self._kept.append(self._cupy.cuda.Memory(nbytes))
            return int(self._kept[-1].ptr)
        if self._end - self._free < nbytes:
            self._kept.append(self._cupy.cuda.Memory(BLOCK_BYTES))
            self._free = int(self._kept[-1].ptr)
            self._end = self._free + BLOCK_BYTES
        self._free += nbytes
        return self._free - nbytes

    def _too_little(self, nbytes: int, where: Where) -> UserError:
        if where == "host":
            return UserError(
                f"The system does not let {nbytes / 1e9:.1f} GB of main memory be locked for the experts; free some, "
                "or choose another placement."
            )
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        return UserError(
            f"The GPU has only {free / 1e9:.1f} GB of memory left while the model is loaded; free some, choose another "
            "placement, or use the CPU."
        )

    def load(
        self, loads: Sequence[Load], on_progress: Progress | None = None, cancel: CancelToken | None = None
    ) -> None:
        """See `Memory.load`."""
        for load in loads:
            if load.change in ("pack4", "pack8"):
                self._compiler.function(_packing(load))  # once, before the threads want it
        lane, streams = _Lane(), []

        def carry(piece: Load) -> None:
            packed = piece.change in ("pack4", "pack8")
            if piece.where == "host" and not packed:
                piece.apply(view(piece.address, piece.nbytes))
                return
            if lane.stream is None:
                lane.stream, lane.stages = self._cupy.cuda.Stream(non_blocking=True), self._new_stages(loads)
                streams.append(lane.stream)
            stage = lane.stages[lane.turn]
            lane.turn = (lane.turn + 1) % STAGES
            stage.event.synchronize()
            self._send(piece, stage, lane.stream)
            stage.event.record(lane.stream)

        try:
            carry_all(loads, carry, on_progress, cancel)
        finally:
            for stream in streams:
                stream.synchronize()

    def _new_stages(self, loads: Sequence[Load]) -> tuple[_Stage, ...]:
        cuda = self._cupy.cuda
        # A piece of few very long rows may be larger than others.
        most = max(piece.source.nbytes for load in loads for piece in [next(load.pieces(PIECE_BYTES))])
        packs = any(load.change in ("pack4", "pack8") for load in loads)
        return tuple(
            _Stage(cuda.PinnedMemory(most), cuda.Memory(most) if packs else None, cuda.Event(disable_timing=True))
            for _ in range(STAGES)
        )

    def _send(self, piece: Load, stage: _Stage, stream: Any) -> None:
        runtime = self._cupy.cuda.runtime
        if piece.change not in ("pack4", "pack8"):
            piece.apply(view(stage.locked.ptr, piece.nbytes))
            runtime.memcpyAsync(piece.address, stage.locked.ptr, piece.nbytes, _COPY_DEFAULT, stream.ptr)
            return
        view(stage.locked.ptr, piece.nbytes)[...] = piece.source.reshape(-1)
        runtime.memcpyAsync(stage.device.ptr, stage.locked.ptr, piece.nbytes, _COPY_DEFAULT, stream.ptr)
        launch = _packing(piece)
        arguments = (ctypes.c_void_p * 2)(stage.device.ptr, piece.address)
        pointers = (ctypes.c_void_p * 2)(*(ctypes.addressof(arguments) + 8 * index for index in range(2)))
        self._cupy.cuda.driver.launchKernel(
            self._compiler.function(launch), *launch.grid, *launch.block, 0, stream.ptr, ctypes.addressof(pointers), 0
        )

    def store(self, values: np.ndarray) -> int:
        """See `Memory.store`."""
        values = np.ascontiguousarray(values)
        (address,) = self.allocate([values.nbytes])
        self._cupy.cuda.runtime.memcpy(address, values.ctypes.data, values.nbytes, _COPY_DEFAULT)
        return address

    def copy(self, pieces: Sequence[tuple[int, int, int]]) -> None:
        """See `Memory.copy`."""
        stream = self._cupy.cuda.Stream(non_blocking=True)
        for source, target, nbytes in pieces:
            self._cupy.cuda.runtime.memcpyAsync(target, source, nbytes, _COPY_DEFAULT, stream.ptr)
        stream.synchronize()

    def read(self, address: int, nbytes: int) -> np.ndarray:
        """See `Memory.read`."""
        values = np.empty(nbytes, np.uint8)
        self._cupy.cuda.runtime.deviceSynchronize()
        self._cupy.cuda.runtime.memcpy(values.ctypes.data, address, nbytes, _COPY_DEFAULT)
        return values

    def close(self) -> None:
        """See `Memory.close`."""
        self._kept.clear()
        self._free = self._end = 0


def _packing(load: Load) -> Any:
    rows, row_bytes = load.source.shape
    bits = int(load.change[-1])
    return pack_launch(rows, row_bytes * 8 // bits, bits)
