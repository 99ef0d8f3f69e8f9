"""Reading a prompt, a piece at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.sampling import HostLogits, Logits
from lsp_agent.engine.session import Decoder
from lsp_agent.engine.state import State


def read_piece(
    decoder: Decoder, state: State, ids: Sequence[int], most: int, cancel: CancelToken, want_logits: bool = True
) -> Logits | None:
    """Read up to `most` of `ids` after what `state` has read, as far as it may in one run.

    Returns what the model says after the last of `ids` once it has read that, and if it is wanted. Raises `Cancelled`;
    the state is then as before.
    """
    part = list(ids[: state.until_stop(min(most, len(ids)))])
    done = want_logits and len(part) == len(ids)
    if done and len(part) == 1:
        (logits,) = decoder.step(part, state)
        state.extend(part)
        return logits
    rows = decoder.run(np.array([part], np.int64), state, [len(part) - 1] if done else [], cancel)
    state.extend(part)
    return HostLogits(rows[0]) if done else None


def prefill(
    decoder: Decoder, state: State, ids: Sequence[int], cancel: CancelToken, chunk: int | None = None
) -> np.ndarray:
    """Read all `ids`, at most `chunk` at a time (by default what suits the device).

    Returns the last token's logits [vocabulary]. Raises `Cancelled`.
    """
    most = chunk or decoder.prefill_chunk
    start = state.length
    while True:
        cancel.raise_if_cancelled()
        logits = read_piece(decoder, state, ids[state.length - start :], most, cancel)
        if logits is not None:
            return logits.all()
