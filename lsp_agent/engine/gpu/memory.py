"""Memory that holds weights for as long as a model is loaded, and the way from a package's file into it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.gpu.packing import INTERLEAVED_ROWS, pack_expert_codes
from lsp_agent.machine import usable_cores

Where = Literal["device", "host"]
"""host: main memory that is locked in place, so that kernels read it over the bus by its address."""
Change = Literal["copy", "half", "pack4", "pack8"]
"""What is done to an array on its way: fp32 becomes fp16; integer codes are packed (see `packing`)."""
Progress = Callable[[int, int], None]
"""Called with the bytes that are done and all bytes."""

ALIGNMENT = 256
PIECE_BYTES = 1 << 23
"""How much is carried at a time, in the bytes of the file."""
MOST_THREADS = 16


@dataclass(frozen=True)
class Load:
    """An array of a package and the address where it goes. What is packed is [rows, bytes of a row]."""

    source: np.ndarray
    address: int
    change: Change = "copy"
    where: Where = "device"

    @property
    def nbytes(self) -> int:
        """Bytes at the address."""
        return loaded_bytes(self.source, self.change)

    def pieces(self, most: int) -> Iterator[Load]:
        """Its parts, of at most `most` bytes in the file (or of as few rows as can be packed)."""
        packed = self.change in ("pack4", "pack8")
        rows = self.source if packed else self.source.reshape(-1)
        row_bytes = rows.nbytes // max(1, len(rows))
        group = INTERLEAVED_ROWS[int(self.change[-1])] if packed else 1
        step = max(1, most // (row_bytes * group)) * group if row_bytes else 1
        for start in range(0, len(rows), step):
            address = self.address + loaded_bytes(rows[:1], self.change) * start
            yield Load(rows[start : start + step], address, self.change, self.where)

    def apply(self, target: np.ndarray) -> None:
        """Write what belongs at the address into `target`, uint8 [nbytes]."""
        if self.change == "half":
            np.copyto(target.view(np.float16), self.source.reshape(-1), casting="same_kind")
        elif self.change == "copy":
            target[...] = self.source.reshape(-1).view(np.uint8)
        else:
            pack_expert_codes(self.source[None], int(self.change[-1]), target.reshape(1, *self.source.shape))


def loaded_bytes(source: np.ndarray, change: Change) -> int:
    """Bytes that an array takes after `change`."""
    return source.size * 2 if change == "half" else source.nbytes


class Memory(Protocol):
    """Allocates, fills and keeps memory; all of it is given back by `close` or with the object."""

    def allocate(self, sizes: Sequence[int], where: Where = "device") -> list[int]:
        """Addresses of new memory of so many bytes each, aligned to `ALIGNMENT`. Raises `UserError` without room."""

    def load(
        self, loads: Sequence[Load], on_progress: Progress | None = None, cancel: CancelToken | None = None
    ) -> None:
        """Carry arrays to their addresses, several at once. Raises `Cancelled`; memory is then half full."""

    def store(self, values: np.ndarray) -> int:
        """The address of new memory of the device with a copy of a small array."""

    def copy(self, pieces: Sequence[tuple[int, int, int]]) -> None:
        """Copy from one address to another so many bytes, for each of `pieces`."""

    def read(self, address: int, nbytes: int) -> np.ndarray:
        """What lies at an address, uint8 [nbytes], when the device has done all that was asked of it."""

    def close(self) -> None:
        """Give everything back. Nothing may use it any longer."""


class HostMemory:
    """Main memory, for kernels that are emulated."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    @property
    def held(self) -> int:
        """Bytes that are allocated."""
        return sum(array.nbytes for array in self._arrays)

    def allocate(self, sizes: Sequence[int], where: Where = "device") -> list[int]:  # noqa: ARG002
        """See `Memory.allocate`."""
        arrays = [np.zeros(nbytes + ALIGNMENT, np.uint8) for nbytes in sizes]
        self._arrays += arrays
        return [_aligned(array.ctypes.data) for array in arrays]

    def load(
        self, loads: Sequence[Load], on_progress: Progress | None = None, cancel: CancelToken | None = None
    ) -> None:
        """See `Memory.load`."""
        carry_all(loads, lambda piece: piece.apply(view(piece.address, piece.nbytes)), on_progress, cancel)

    def store(self, values: np.ndarray) -> int:
        """See `Memory.store`."""
        (address,) = self.allocate([values.nbytes])
        view(address, values.nbytes)[...] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        return address

    def copy(self, pieces: Sequence[tuple[int, int, int]]) -> None:
        """See `Memory.copy`."""
        for source, target, nbytes in pieces:
            ctypes.memmove(target, source, nbytes)

    def read(self, address: int, nbytes: int) -> np.ndarray:
        """See `Memory.read`."""
        return view(address, nbytes).copy()

    def close(self) -> None:
        """See `Memory.close`."""
        self._arrays.clear()


def carry_all(
    loads: Sequence[Load], carry: Callable[[Load], None], on_progress: Progress | None, cancel: CancelToken | None
) -> None:
    """Call `carry` with every piece of `loads`, in several threads. Raises what it raises, and `Cancelled`."""
    total, done = sum(load.source.nbytes for load in loads), 0
    pieces = (piece for load in loads for piece in load.pieces(PIECE_BYTES))

    def one(piece: Load) -> int:
        if cancel is not None:
            cancel.raise_if_cancelled()
        carry(piece)
        return piece.source.nbytes

    with ThreadPoolExecutor(min(usable_cores(), MOST_THREADS), "weights") as pool:
        try:
            for count in pool.map(one, pieces):
                done += count
                if on_progress is not None:
                    on_progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def view(address: int, nbytes: int) -> np.ndarray:
    """Main memory at an address as uint8 [nbytes]; the caller sees to its lifetime."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
