"""One answer in the making: what has been drawn of it, and how its next token is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsp_agent.engine.drafting.drafter import GAIN, CopyDrafter
from lsp_agent.engine.drafting.run_costs import RunCosts
from lsp_agent.engine.request import FinishReason, Step
from lsp_agent.engine.sampling import Logits, Sampler, best_log_probabilities
from lsp_agent.engine.state import State
from lsp_agent.engine.tokens import StopStrings, TextStream, Tokenizer

if TYPE_CHECKING:
    from lsp_agent.engine.scheduling.generation import Job


class Decoding:
    """`ids` are the prompt's tokens and those drawn; whatever holds its state has read all but the last of these.

    A token that belongs to a draft counts as drawn only once the model's own logits have said it.
    """

    def __init__(self, job: Job, index: int, tokenizer: Tokenizer, limit: int) -> None:
        request = job.request
        self.job, self.index = job, index
        self.ids = list(request.prompt)
        self.ended = False
        self.unwanted = False
        """Whoever asked wants no more of it."""
        self.state: State | None = None
        """Its own while it runs, from the prefix cache; a row of a batch may hold its tokens instead, or more."""
        self.held_since = 0.0
        self.progressed = job.arrived
        """When it was last served (seconds of the scheduler's clock)."""
        self._limit = len(self.ids) + limit
        self._sampler = Sampler(request.sampling, index)
        self._stream, self._stops = TextStream(tokenizer), StopStrings(request.sampling.stop)
        self._constraint = request.constraint() if request.constraint is not None else None
        self._drafter: CopyDrafter | None = None

    @property
    def drawn(self) -> int:
        """Tokens of the answer so far."""
        return len(self.ids) - len(self.job.request.prompt)

    def draw(self, logits: Logits) -> Step:
        """Draw the next token from what the model says."""
        request, constraint = self.job.request, self._constraint
        allowed = constraint.allowed() if constraint is not None else None
        token = self._sampler.draw(logits, self.ids, allowed)
        if constraint is not None:
            constraint.accept(token)
        self.ids.append(token)
        self.job.timings.decoded_tokens += 1
        if self._drafter is not None:
            self._drafter.extend([token])
        reason: FinishReason | None = None
        text = ""
        if token in request.stop_ids or (constraint is not None and constraint.left_out()):
            reason = "stop"
        else:
            text = self._stops.push(self._stream.push(token))
            if self._stops.found or (constraint is not None and constraint.ended()):
                reason = "stop"
            elif len(self.ids) >= self._limit:
                reason = "length"
        if reason and not self._stops.found:
            text += self._stops.push(self._stream.finish()) + self._stops.finish()
        self.ended = reason is not None
        logprob = logits.log_probability(token)
        return Step(self.index, token, text, logprob, reason, best_log_probabilities(logits, request.top))

    def propose(self, most: int, costs: RunCosts, least: float = 1.0) -> list[int]:
        """Up to `most` tokens that may well come next, where verifying them by the `costs` of runs is expected to be
        `least` times as fast as single steps: those that must come, else those that the drafter guesses."""
        room = min(most, self._limit - len(self.ids) - 1)
        if room <= 0 or not self.job.request.drafting:
            return []
        forced = self._constraint.forced() if self._constraint is not None else []
        if forced:
            draft = forced[:room]
            return draft if 1 + len(draft) > least * costs.of(1 + len(draft)) else []
        if self._drafter is None:
            request = self.job.request
            self._drafter = CopyDrafter(request.prompt, request.prediction, costs)
            self._drafter.extend(self.ids[len(request.prompt) :])
        return self._drafter.propose(room, max(least, GAIN))
