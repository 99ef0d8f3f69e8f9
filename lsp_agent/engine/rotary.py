"""Rotary embedding tables, with the ways in which published checkpoints stretch them."""

from __future__ import annotations

import math

import numpy as np

from lsp_agent.engine.architecture import ModelConfig, RopeScaling
from lsp_agent.errors import UserError


def rotary_tables(config: ModelConfig, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [context, rotary size / 2], fp32 (Su et al., 2021); `UserError` for odd sizes."""
    size = config.rotary_size
    if size % 16:
        raise UserError(
            f"The model rotates {size} elements a head, and ONNX Runtime only multiples of 16; use another."
        )
    frequencies = config.rope_base ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    scale = 1.0
    if config.rope_scaling is not None:
        frequencies, scale = _scaled(frequencies, config.rope_base, size, config.rope_scaling)
    # transformers and llama.cpp compute positions times frequencies in fp32; so does this, to match them.
    angles = np.outer(np.arange(context, dtype=np.float32), frequencies.astype(np.float32)).astype(np.float64)
    return (np.cos(angles) * scale).astype(np.float32), (np.sin(angles) * scale).astype(np.float32)


def _scaled(frequencies: np.ndarray, base: float, size: int, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0

    def dimension(rotations: float) -> float:
        """The dimension whose wave turns `rotations` times over the original context (YaRN, equation 18)."""
        return size * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    blended = frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
    attention = scaling.attention_factor
    if attention is None:
        attention = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return blended, attention
