"""Continuous batching: the requests of all clients share one model, a bounded piece of work at a time.

A request waits for a state, reads its prompt in pieces, and decodes; who decodes is stepped together with the others.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from lsp_agent.engine.gpu.errors import GpuLost, explain
from lsp_agent.engine.prefixes.cache import PrefixCache
from lsp_agent.engine.request import Request
from lsp_agent.engine.sampling import Logits
from lsp_agent.engine.scheduling.costs import PromptCosts
from lsp_agent.engine.scheduling.decoding import Decoding
from lsp_agent.engine.scheduling.generation import Generation, Job, OnStep
from lsp_agent.engine.scheduling.policy import Policy
from lsp_agent.engine.scheduling.prefill import read_piece
from lsp_agent.engine.scheduling.stepping import Stepper
from lsp_agent.engine.session import Decoder
from lsp_agent.engine.state import State
from lsp_agent.engine.tokens import Tokenizer
from lsp_agent.errors import Cancelled, PromptTooLong, UserError

log = logging.getLogger(__name__)

PIECE_S = 0.25
"""Seconds of reading in one piece while others wait."""
SHORTEST_PIECE = 8
"""A piece is at least the device's chunk of a prompt divided by this."""
FULL_S = 0.1
"""Time for which nobody asks for a state again, while there is other work, unless one is given back."""
MOVE_S = 0.1
"""Seconds of moving tokens from and to main memory at a time, while others decode."""
QUANTUM_S = 4.0
"""Time after which a state changes hands between requests of the same priority where there are too few."""


class Scheduler:
    """Serves requests; all but `submit`, `wake` and `status` is for one thread, the engine's."""

    def __init__(
        self,
        decoder: Decoder,
        prefixes: PrefixCache,
        tokenizer: Tokenizer,
        rows: int,
        row_capacity: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`rows`: most sequences in one run, of at most `row_capacity` tokens each; `clock`: seconds."""
        self._decoder, self._prefixes, self._tokenizer, self._clock = decoder, prefixes, tokenizer, clock
        self.wake: Callable[[], None] = lambda: None
        """Called by `submit`, on any thread: there is work."""
        self.broken: GpuLost | None = None
        """Why nothing can be served any more."""
        self._submitted: deque[Job] = deque()
        self._jobs: list[Job] = []
        self._waiting: list[Decoding] = []  # for a state, or for more of their prompts to be read
        self._decoding: list[Decoding] = []
        self._full_until = 0.0  # all states were taken a moment ago
        self._policy, self._prompt_costs = Policy(), PromptCosts()
        self._stepper = Stepper(decoder, rows, row_capacity, clock)

    def submit(self, request: Request, on_step: OnStep | None = None) -> Generation:
        """Take a request on; its steps go to `on_step`, or to whoever iterates over what is returned.

        Raises `PromptTooLong` and `UserError` for what cannot be served.
        """
        context = self._prefixes.capacity
        if self.broken is not None:
            raise self.broken
        if not request.prompt:
            raise UserError("The prompt is empty; give the model something to read.")
        length = len(request.prompt)
        if length >= context:
            raise PromptTooLong(f"The prompt has {length} tokens and the context holds {context}; shorten the prompt.")
        limit = min(request.sampling.max_tokens, context - length)
        job = Job(request, self._tokenizer, limit, self._clock(), on_step)
        if limit > 0:
            self._submitted.append(job)
            if self.broken is not None:  # since it was looked at, so that nobody may come for the job
                job.end(self.broken)
        else:
            job.end()
        self.wake()
        return Generation(job, self)

    def status(self) -> dict[str, Any]:
        """How many answers are `running` (their prompts are read, or they decode) and `waiting`; also by client."""
        held = {id(one) for one in [*self._decoding, *self._waiting] if one in self._decoding or one.state is not None}
        clients: dict[str, dict[str, int]] = {}
        for job in [*self._jobs, *self._submitted]:
            counts = clients.setdefault(job.request.client, {"running": 0, "waiting": 0})
            for one in job.decodings:
                if not one.ended:
                    counts["running" if id(one) in held else "waiting"] += 1
        totals = {kind: sum(counts[kind] for counts in clients.values()) for kind in ("running", "waiting")}
        return {**totals, "clients": clients}

    def advance(self) -> bool:
        """Do one bounded piece of work: of a prompt, or a step of all who decode. False when there is nothing to do."""
        self._accept()
        self.drop_unwanted()
        now = self._clock()
        for reader in self._policy.order(self._waiting, now):
            if not self._policy.reads_first(reader, self._decoding, now):
                break
            try:
                if reader.state is not None or self._take_state(reader, now):
                    self._read(reader)
                    return True
            except Exception as error:
                self._fail(reader, error)
                return True
            if self._prefixes.unfinished:
                break
        if self._decoding:
            self._step()
            return True
        return False

    def drop_unwanted(self) -> None:
        """End what was cancelled or finished by those who asked."""
        for job in list(self._jobs):
            if job.unwanted:
                self._drop(job, Cancelled())
            elif any(one.unwanted and not one.ended for one in job.decodings):
                self._finish_unwanted(job)

    def _finish_unwanted(self, job: Job) -> None:
        for one in job.decodings:
            if one.unwanted and not one.ended:
                one.ended = True
                heir = next((other for other in job.decodings if not other.ended), None)
                if heir is not None and not one.drawn and one in self._waiting:  # the prompt is read for the others
                    heir.state, one.state, heir.held_since = one.state, None, one.held_since
                    self._waiting[self._waiting.index(one)] = heir
                self._retire(one)
        self._end_if_done(job)

    def _accept(self) -> None:
        while self._submitted:
            job = self._submitted.popleft()
            self._jobs.append(job)
            self._waiting.append(job.decodings[0])  # the others follow when the prompt is read

    # States

    def _take_state(self, one: Decoding, now: float) -> bool:
        """Give it a state, somebody else's if need be."""
        busy = self._decoding or any(other.state is not None for other in self._waiting)
        asks = not busy or now >= self._full_until
        state = self._take(one) if asks else None
        while state is None and not self._prefixes.unfinished:
            if not self._free_state(one, now):
                if asks:  # a state may be given back by others than those who decode
                    self._full_until = now + FULL_S
                break
            state = self._take(one)
        if state is None:
            return False
        one.state, one.held_since = state, now
        if not one.job.begun:
            one.job.begun = True
            one.job.timings.queued_s = now - one.job.arrived
            one.job.timings.cached_tokens = state.length
        return True

    def _take(self, one: Decoding) -> State | None:
        return self._prefixes.take(one.ids, one.job.request.boundaries, MOVE_S if self._decoding else math.inf)

    def _free_state(self, waiting: Decoding, now: float) -> bool:
        """Take a state from somebody: who can go on in a row loses nothing, others wait with what they have drawn."""
        if self.make_room():
            return True
        holders = [one for one in (*self._decoding, *self._waiting) if one.state is not None]
        victim = self._policy.victim(holders, waiting, now, QUANTUM_S)
        if victim is None:
            return False
        if victim in self._decoding:
            self._swap_out(victim, now)
        self._release(victim)
        return True

    def make_room(self) -> bool:
        """Take a state from somebody who loses nothing by it; False when there is nobody."""
        # In a row nothing is drafted, so those first to whom that means least.
        for one in sorted(self._decoding, key=lambda one: one.job.timings.drafted_tokens):
            if one.state is not None and self._stepper.to_row(one, one.state):
                self._release(one)
                return True
        return False

    def _swap_out(self, one: Decoding, now: float) -> None:
        """Let it wait until it can go on; all that it has read is remembered."""
        self._decoding.remove(one)
        self._waiting.append(one)
        self._leave_row(one)
        one.progressed = now

    def _leave_row(self, one: Decoding) -> None:
        try:
            if one.state is None and (held := self._stepper.row_state(one)) is not None:
                self._prefixes.keep(held)
        finally:
            self._stepper.leave(one)

    def _release(self, one: Decoding) -> None:
        state, one.state = one.state, None
        if state is not None:
            self._full_until = 0.0
            self._prefixes.release(state)

    # Reading

    def _piece(self, reader: Decoding) -> int:
        """Most tokens of its prompt to read now."""
        most = self._decoder.prefill_chunk
        if len(self._jobs) == 1 and reader.job.on_step is None:
            return most
        return self._prompt_costs.tokens_for(PIECE_S, max(1, most // SHORTEST_PIECE), most)

    def _read(self, reader: Decoding) -> None:
        job, state, started = reader.job, reader.state, self._clock()
        assert state is not None
        before = state.length
        first = not reader.drawn
        ids = reader.ids[before:] if first else reader.ids[before:-1]
        logits = None
        if ids:
            logits = read_piece(self._decoder, state, ids, self._piece(reader), job.request.cancel, want_logits=first)
        now = self._clock()
        job.timings.prefill_s += now - started
        if state.length - before > 1:
            self._prompt_costs.note(state.length - before, now - started)
        self._policy.note_read(reader, self._decoding, now - started, now)
        if logits is not None:
            self._waiting.remove(reader)
            self._begin_answers(reader, logits)
        elif not first and state.length == len(reader.ids) - 1:
            self._waiting.remove(reader)
            self._decoding.append(reader)

    def _begin_answers(self, reader: Decoding, logits: Logits) -> None:
        """Draw the first token of each answer from what the model says after the prompt."""
        started, job, state = self._clock(), reader.job, reader.state
        assert state is not None
        for one in job.decodings:
            if not one.ended:
                job.give(one.draw(logits))
                if not one.ended and one is not reader:
                    # Rows are copied from the one state now; those without wait for a state of their own.
                    (self._decoding if self._stepper.to_row(one, state) else self._waiting).append(one)
        job.timings.decode_s += self._clock() - started
        if reader.ended:
            self._retire(reader)
        else:
            self._decoding.insert(0, reader)
        self._end_if_done(job)

    # Decoding

    def _step(self) -> None:
        decoding = list(self._decoding)
        try:
            self._mend_rows()
            decoding = list(self._decoding)
            started = self._clock()
            for one, error in self._stepper.step(decoding, lambda one, step: one.job.give(step)):
                self._fail(one, error)
        except Exception as error:  # not of a run: of copying between states and rows
            for one in decoding:
                self._fail(one, error)
            return
        now = self._clock()
        self._policy.note_steps(decoding, now - started, now)
        for one in decoding:
            if one.ended and not one.job.ended:
                self._retire(one)
        for job in {id(one.job): one.job for one in decoding}.values():
            job.timings.decode_s += now - started
            self._end_if_done(job)

    def _mend_rows(self) -> None:
        """Give a state to those who have only a row and need more, because it is full or to verify guesses."""
        now = self._clock()
        for one in list(self._decoding):
            if one.state is not None:
                continue
            full = self._stepper.outgrown(one)
            try:
                if full or (not self._waiting and len(one.job.decodings) == 1 and now - one.held_since > QUANTUM_S):
                    one.held_since = now
                    one.state = self._prefixes.take(one.ids)
                    self._stepper.sync(one)
                if full:
                    self._swap_out(one, now)
            except Exception as error:
                self._fail(one, error)

    # Ends

    def _fail(self, one: Decoding, error: Exception) -> None:
        """One request's error is its own, unless the GPU was lost."""
        sentence = explain(error)
        if sentence is not None:
            sentence.__cause__ = error
        if isinstance(sentence, GpuLost):
            self._break(sentence)
        elif self.broken is None:
            self._drop(one.job, sentence or error)

    def _break(self, lost: GpuLost) -> None:
        """End all requests; what they held cannot even be given back."""
        if self.broken is None:
            self.broken = lost
            self._decoding, self._waiting = [], []
            for job in [*self._jobs, *self._submitted]:
                self._end(job, lost)
            self._submitted.clear()

    def _drop(self, job: Job, error: Exception) -> None:
        for one in job.decodings:
            self._retire(one)
        self._end(job, error)

    def _retire(self, one: Decoding) -> None:
        """Give back what an answer held; what it read is remembered."""
        one.ended = True
        for give_back in (self._leave_row, self._release):
            try:
                give_back(one)
            except Exception as error:  # such as for want of memory to remember it in: nobody else's fault
                if isinstance(lost := explain(error), GpuLost):
                    self._break(lost)
                else:
                    log.exception("What an answer has read is not remembered.")
        for queue in (self._waiting, self._decoding):
            if one in queue:
                queue.remove(one)
        if not self._decoding:
            self._stepper.rest()

    def _end_if_done(self, job: Job) -> None:
        if all(one.ended for one in job.decodings):
            self._end(job)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
        job.end(error)
