"""What is asked of the engine, in tokens, and what comes back, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling

if TYPE_CHECKING:
    from lsp_agent.engine.constraints import Constraint

FinishReason = Literal["stop", "length"]

INTERACTIVE, ORDINARY = -1, 0
"""Priorities, lower first as vLLM's: somebody waits at the cursor; an agent waits."""


@dataclass(frozen=True)
class Request:
    """One question. `n` answers are decoded together after one reading of the `prompt`.

    `boundaries`: lengths of the prompt that later prompts may branch off, such as the end of each message; a recurrent
    state is remembered there. `prediction`: tokens that the answer may copy, besides those of the prompt. `drafting`:
    guess tokens and verify several in one run, which changes the speed and, beyond rounding, nothing else.
    `constraint` makes what each answer must obey. `stop_ids` end an answer. `client` says who asks: the engine is fair
    between clients. `top`: how many of the best tokens each step names.
    """

    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    cancel: CancelToken = field(default_factory=CancelToken)
    n: int = 1
    stop_ids: frozenset[int] = frozenset()
    boundaries: Sequence[int] = ()
    prediction: Sequence[int] = ()
    drafting: bool = True
    constraint: Callable[[], Constraint] | None = None
    priority: int = ORDINARY
    client: str = ""
    top: int = 0


@dataclass(frozen=True)
class Step:
    """One token of sequence `index`; `text` is what it lets be shown. A stop token has no text of its own.

    `top`: the best tokens and their natural-log probabilities, best first, as many as were asked for.
    """

    index: int
    token: int
    text: str
    logprob: float
    finish_reason: FinishReason | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Timings:
    """Wall seconds and tokens of one request; `decoded_tokens` counts all sequences.

    `queued_s`: until its prompt was begun. `prefill_s` and `decode_s`: of runs that served it, also with others. Of the
    `drafted_tokens` that were guessed, `accepted_tokens` were what the model would have said.
    """

    queued_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    decoded_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
