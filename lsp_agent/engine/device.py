"""Where a session runs: its execution provider, and the memory that it shares with us without copies."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import onnxruntime as ort

from lsp_agent.engine.gpu.errors import NoGpu, unusable, usable_cupy
from lsp_agent.engine.pages import zero_pages
from lsp_agent.errors import UserError
from lsp_agent.machine import usable_memory

log = logging.getLogger(__name__)

STAGED_BYTES = 8 << 20
"""Page-locked memory through which arrays come to main memory."""
DeviceName = Literal["cpu", "cuda"]
DeviceChoice = Literal["auto", "cpu", "cuda"]
Array = Any
"""A `numpy.ndarray` or, on the GPU, a `cupy.ndarray`: both have the same methods."""


class Device(Protocol):
    """Makes arrays in the device's memory and hands them to ONNX Runtime by address.

    `history`: how many runs a recurrent state can go back there without a checkpoint; `checkpoints`: how many of
    these a state keeps in the device's memory, where that is not main memory. `prefill_chunk`: tokens of a prompt to
    read in one run.
    """

    name: DeviceName
    history: int
    checkpoints: int
    prefill_chunk: int

    def providers(self, options: dict[str, str]) -> list[Any]:
        """What `onnxruntime.InferenceSession` takes as providers; `options` are further options of this one."""

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """An array of zeros."""

    def array(self, values: np.ndarray) -> Array:
        """`values` in the device's memory; on the CPU the array itself."""

    def host(self, array: Array) -> np.ndarray:
        """A copy in main memory."""

    def fetch(self, array: Array, into: np.ndarray) -> None:
        """Copy `array` to main memory, into a contiguous array of the same shape and type."""

    def copy(self, array: Array) -> Array:
        """A copy in the device's memory."""

    def assign(self, target: Array, values: Array) -> None:
        """`target[...] = values`, wherever the values are."""

    def address(self, array: Array) -> int:
        """Where a contiguous array begins."""

    def captured(self, session: ort.InferenceSession, binding: ort.IOBinding) -> Callable[[], None]:
        """A function that repeats a run with the same addresses, as cheaply as the device can, without waiting."""

    def finish(self, binding: ort.IOBinding) -> None:
        """Wait until a run's outputs are there."""

    def wait(self) -> None:
        """Until all that was asked of the device is done."""

    def free_memory(self) -> int:
        """Bytes of the device's memory that can be had now."""


class CpuDevice:
    """Main memory; unwritten pages of zeros cost none."""

    name: DeviceName = "cpu"
    history = 8
    checkpoints = 16
    prefill_chunk = 256

    def providers(self, options: dict[str, str]) -> list[Any]:
        """See `Device.providers`."""
        return [("CPUExecutionProvider", options)]

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """See `Device.zeros`."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return zero_pages(size).view(dtype).reshape(shape)

    def array(self, values: np.ndarray) -> Array:
        """See `Device.array`."""
        return np.ascontiguousarray(values)

    def host(self, array: Array) -> np.ndarray:
        """See `Device.host`."""
        return np.array(array)

    def fetch(self, array: Array, into: np.ndarray) -> None:
        """See `Device.fetch`."""
        into[...] = array

    def copy(self, array: Array) -> Array:
        """See `Device.copy`."""
        return np.array(array)

    def assign(self, target: Array, values: Array) -> None:
        """See `Device.assign`."""
        target[...] = values

    def address(self, array: Array) -> int:
        """See `Device.address`."""
        return int(array.ctypes.data)

    def captured(self, session: ort.InferenceSession, binding: ort.IOBinding) -> Callable[[], None]:
        """See `Device.captured`."""
        return lambda: session.run_with_iobinding(binding)

    def finish(self, binding: ort.IOBinding) -> None:
        """See `Device.finish`: runs return when they are done."""

    def wait(self) -> None:
        """See `Device.wait`."""

    def free_memory(self) -> int:
        """See `Device.free_memory`."""
        return usable_memory()


class CudaDevice:
    """The first NVIDIA GPU. One stream carries ONNX Runtime's work and ours, so that neither needs to wait."""

    name: DeviceName = "cuda"
    history = 8
    checkpoints = 6  # of 79 MB each for Qwen3-Coder-Next
    prefill_chunk = 2048

    def __init__(self) -> None:
        self._cupy = _cupy()
        self._staging: Any = None
        try:
            self._stream = self._cupy.cuda.Stream(non_blocking=True)  # the first call that takes memory
        except self._cupy.cuda.runtime.CUDARuntimeError as error:
            raise unusable(error) from error

    @property
    def stream(self) -> AbstractContextManager[Any]:
        """Around all that CuPy is to do: its current stream is each thread's own, and waits for none of this one's."""
        return cast(AbstractContextManager[Any], self._stream)

    def providers(self, options: dict[str, str]) -> list[Any]:
        """See `Device.providers`."""
        return [("CUDAExecutionProvider", {"user_compute_stream": str(self._stream.ptr), **options})]

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Array:
        """See `Device.zeros`."""
        with self._stream:
            return self._cupy.zeros(shape, dtype)

    def array(self, values: np.ndarray) -> Array:
        """See `Device.array`."""
        with self._stream:
            return self._cupy.asarray(np.ascontiguousarray(values))

    def host(self, array: Array) -> np.ndarray:
        """See `Device.host`."""
        with self._stream:
            return np.asarray(self._cupy.asnumpy(array, stream=self._stream))

    def fetch(self, array: Array, into: np.ndarray) -> None:
        """See `Device.fetch`: by way of page-locked memory, since copies to other memory wait for each page; locking
        the pages of `into` would take longer still."""
        runtime = self._cupy.cuda.runtime
        with self._stream:
            packed = self._cupy.ascontiguousarray(array)
            if self._staging is None:
                self._staging = self._cupy.cuda.alloc_pinned_memory(STAGED_BYTES)
            staged, target = np.frombuffer(self._staging, np.uint8, STAGED_BYTES), into.reshape(-1).view(np.uint8)
            for start in range(0, packed.nbytes, STAGED_BYTES):
                size = min(STAGED_BYTES, packed.nbytes - start)
                source = packed.data.ptr + start
                runtime.memcpyAsync(staged.ctypes.data, source, size, runtime.memcpyDeviceToHost, self._stream.ptr)
                self._stream.synchronize()
                target[start : start + size] = staged[:size]

    def copy(self, array: Array) -> Array:
        """See `Device.copy`."""
        with self._stream:
            return array.copy()

    def assign(self, target: Array, values: Array) -> None:
        """See `Device.assign`."""
        with self._stream:
            target[...] = self._cupy.asarray(values)

    def address(self, array: Array) -> int:
        """See `Device.address`."""
        return int(array.data.ptr)

    def borrow(self, address: int, shape: tuple[int, ...], dtype: str) -> Array:
        """An array over memory that the GPU reads at `address` and that is not its own."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = self._cupy.cuda.UnownedMemory(address, size, self)
        return self._cupy.ndarray(shape, dtype, self._cupy.cuda.MemoryPointer(memory, 0))

    def captured(self, session: ort.InferenceSession, binding: ort.IOBinding) -> Callable[[], None]:
        """See `Device.captured`: a CUDA graph, which is ours and goes with the function."""
        options = without_waiting()  # waiting cannot be captured, and whoever reads a result waits for it anyway
        session.run_with_iobinding(binding, options)  # allocates, which cannot be captured either
        with self._stream:
            self._stream.begin_capture()
            try:
                session.run_with_iobinding(binding, options)
            finally:
                graph = self._stream.end_capture()
        stream = self._stream
        return lambda: graph.launch(stream)

    def finish(self, binding: ort.IOBinding) -> None:
        """See `Device.finish`."""
        binding.synchronize_outputs()

    def wait(self) -> None:
        """See `Device.wait`."""
        self._stream.synchronize()

    def free_memory(self) -> int:
        """See `Device.free_memory`."""
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        return int(free)


def _cupy() -> Any:
    """CuPy over a working GPU; raises `NoGpu` that says what is missing."""
    cupy = usable_cupy(ort.get_available_providers())
    ort.preload_dlls()
    return cupy


def requested_device(name: str | None = None) -> DeviceChoice:
    """`name`; None is what `LSP_AGENT_DEVICE` says, auto by default. Raises `UserError`."""
    chosen = name or os.environ.get("LSP_AGENT_DEVICE") or "auto"
    for device in get_args(DeviceChoice):
        if chosen == device:
            return cast(DeviceChoice, device)
    raise UserError(f"There is no device {chosen!r}; set LSP_AGENT_DEVICE to auto, cpu or cuda.")


def open_device(name: DeviceChoice | None = None) -> Device:
    """The device called `name` (see `requested_device`); auto is the GPU where one can be used, else the CPU.

    Raises `UserError` when the GPU is asked for and cannot be used.
    """
    chosen = requested_device(name)
    if chosen == "auto":
        try:
            return CudaDevice()
        except NoGpu as error:
            log.info("running on the CPU: %s", error)
            return CpuDevice()
    return CudaDevice() if chosen == "cuda" else CpuDevice()


def without_waiting() -> ort.RunOptions:
    """For a run whose result is read by what is queued after it, so that nobody need wait."""
    options = ort.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def bind_input(device: Device, binding: ort.IOBinding, name: str, array: Array) -> None:
    """Let a run read `array`, which must live until it is done."""
    binding.bind_input(name, device.name, 0, array.dtype.type, array.shape, device.address(array))


def bind_output(device: Device, binding: ort.IOBinding, name: str, array: Array) -> None:
    """Let a run write `array`."""
    binding.bind_output(name, device.name, 0, array.dtype.type, array.shape, device.address(array))
