"""Functions on the host that nodes of a graph call: they run another session in the middle of a run."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from typing import Any

_HOST_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p))
_MOST = 400
"""Bytes of an error that `operators.c` has room for."""
_REASON = re.compile("CUDA failure|CUBLAS|Failed to allocate")


class HostCall:
    """`run` as a function for `host_node`, with rows, length, and the addresses of `count` inputs and outputs.

    It must live as long as the node's session. What `run` raises, the node's run raises as ONNX Runtime's error.
    """

    def __init__(self, run: Callable[[int, int, Sequence[int]], None], count: int) -> None:
        self._run, self._count = run, count
        self._callback = _HOST_FUNCTION(self._call)
        self._wrong = ctypes.create_string_buffer(b"")
        self.function = ctypes.cast(self._callback, ctypes.c_void_p).value or 0

    def _call(self, rows: int, length: int, values: Any) -> int:
        """See `HostFunction` in abi.h."""
        try:
            self._run(rows, length, values[: self._count])
        except Exception as error:  # nothing may be raised into ONNX Runtime
            self._wrong = ctypes.create_string_buffer(_shortened(str(error)))
            return ctypes.addressof(self._wrong)
        return 0


def _shortened(text: str) -> bytes:
    """What fits: ONNX Runtime puts whole signatures of functions before what CUDA says, which `errors` looks for."""
    found = _REASON.search(text, 100)
    if len(text) > _MOST and found:
        text = f"{text[:100]} ... {text[found.start() :]}"
    return text.encode("ascii", "replace")[:_MOST]
