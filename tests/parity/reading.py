"""Reading tokens with the engine's decoder, piece by piece, for the logits of every position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lsp_agent.engine.session import Decoder
from lsp_agent.engine.state import State

CAPACITY = 512
Piece = np.ndarray | Sequence[int]


def read(decoder: Decoder, pieces: Sequence[Piece], state: State | None = None) -> np.ndarray:
    """Append the pieces to `state`, a new one by default, one after another; logits [tokens, vocabulary]."""
    state = state or decoder.new_state(CAPACITY)
    logits = []
    for piece in pieces:
        logits.append(decoder.run(np.array([piece], np.int64), state, range(len(piece))))
        state.extend(list(piece))
    return np.concatenate(logits)
