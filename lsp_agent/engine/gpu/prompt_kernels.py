"""The kernels of a prompt that ONNX Runtime has only as several passes over its tokens: Gated DeltaNet's ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import NodeProto

from lsp_agent.engine.architecture import LinearAttentionConfig
from lsp_agent.engine.gpu.compiler import KernelCompiler
from lsp_agent.engine.gpu.launch import Launch
from lsp_agent.engine.gpu.operators import launch_node

TOKENS, CHANNELS, THREADS = 16, 8, 128
"""Of `convolve_prompt`: a thread's tokens and channels, and threads of a block."""
WARPS = 8


class PromptKernels:
    """Nodes of the kernels; `address` says where a vector's fp32 values lie."""

    def __init__(self, address: Callable[[str], int], compiler: KernelCompiler) -> None:
        self._address, self._compiler = address, compiler

    def convolve(
        self, linear: LinearAttentionConfig, weight: str, inputs: Sequence[str], outputs: Sequence[str]
    ) -> NodeProto:
        """See `convolve_prompt`, for its inputs and outputs."""
        launch = convolve_prompt(linear)
        keys, values = _widths(linear)
        shapes = [*[(0, 0, width) for width in (keys, keys, values)], (0, linear.kernel - 1, 2 * keys + values)]
        made = [(name, "h", shape) for name, shape in zip(outputs, shapes, strict=True)]
        function = self._compiler.function(launch)
        return launch_node(launch, function, inputs, made, [self._address(weight)], rows=TOKENS)

    def gate(
        self, linear: LinearAttentionConfig, epsilon: float, weight: str, inputs: Sequence[str], output: str
    ) -> NodeProto:
        """See `gate_prompt`, for its inputs and output."""
        launch = gate_prompt(linear, epsilon)
        made = [(output, "h", (0, 0, 0))]
        return launch_node(launch, self._compiler.function(launch), inputs, made, [self._address(weight)], rows=1)


def covers(linear: LinearAttentionConfig) -> bool:
    """Whether both kernels cover these sizes."""
    return all(width % CHANNELS == 0 for width in _widths(linear)) and linear.value_size % 4 == 0


def convolve_prompt(linear: LinearAttentionConfig) -> Launch:
    """The convolution and SiLU of rows of qkv and gates, for `launch_node` with `TOKENS` rows a block.

    Arguments of the kernel: rows h [sequences, length, channels + gates], the tokens before h [sequences, kernel - 1,
    channels]; q, k, v h [sequences, length, their channels], the new tokens before; the convolution's weights f32
    [channels, 1, kernel].
    """
    keys, values = _widths(linear)
    macros = {"TOKENS": TOKENS, "CONV": linear.kernel, "KEYS": keys, "VALUES": values}
    macros["STRIDE"] = 2 * keys + 2 * values
    groups = -(-(2 * keys + values) // (CHANNELS * THREADS))
    return Launch("convolve_prompt", _macros(macros), (1, groups, 1), (THREADS, 1, 1))


def gate_prompt(linear: LinearAttentionConfig, epsilon: float) -> Launch:
    """The norm of each value head, gated, for `launch_node` with one row a block.

    Arguments of the kernel: y h [sequences, length, values], rows of qkv and gates as `convolve_prompt`'s; the result
    h like y; the norm's weights f32 [value size].
    """
    keys, values = _widths(linear)
    channels = 2 * keys + values
    macros: dict[str, int | str] = {"WARPS": WARPS, "HEADS": linear.value_heads, "HEAD": linear.value_size}
    macros |= {"OFFSET": channels, "STRIDE": channels + values, "EPSILON": f"{epsilon!r}f"}
    return Launch("gate_prompt", _macros(macros), (1, 1, 1), (32 * WARPS, 1, 1))


def _widths(linear: LinearAttentionConfig) -> tuple[int, int]:
    return linear.key_heads * linear.key_size, linear.value_heads * linear.value_size


def _macros(values: dict[str, int] | dict[str, int | str]) -> tuple[tuple[str, str], ...]:
    return tuple((name, str(value)) for name, value in values.items())
