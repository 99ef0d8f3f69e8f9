"""Steps of all who decode: together where that is faster, alone where a long guess is to be verified."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from lsp_agent.engine.drafting.run_costs import RunCosts
from lsp_agent.engine.request import Step
from lsp_agent.engine.sampling import Logits
from lsp_agent.engine.scheduling.batch import Batch, Row
from lsp_agent.engine.scheduling.costs import StepCosts
from lsp_agent.engine.scheduling.decoding import Decoding
from lsp_agent.engine.session import Decoder
from lsp_agent.engine.state import State

log = logging.getLogger(__name__)

KEPT_BYTES = 2**28
"""Main memory that rows keep for later ones, which need not be given zeroed pages again."""

Emit = Callable[[Decoding, Step], None]


class Stepper:
    """Moves decodings on by at least one token each. Their tokens lie in states of their own, in rows, or in both."""

    def __init__(self, decoder: Decoder, rows: int, row_capacity: int, clock: Callable[[], float]) -> None:
        """`rows`: most sequences in one run, none of which may have more than `row_capacity` tokens."""
        self._decoder, self._rows, self._row_capacity, self._clock = decoder, rows, row_capacity, clock
        self._batch: Batch[Decoding] | None = None
        self._costs, self.run_costs = StepCosts(), RunCosts()

    def step(self, decoding: Sequence[Decoding], emit: Emit) -> Iterator[tuple[Decoding, Exception]]:
        """A round: each draws one token, or as many as it had guessed right. Yields who failed, and why."""
        if len(decoding) == 1 and decoding[0].state is not None:
            yield from self._guarded(decoding[0], self._alone, emit)
            return
        for one in decoding:
            if self.outgrown(one):
                self.leave(one)
        drafts = {id(one): self._draft(one, len(decoding)) for one in decoding}
        together = [one for one in decoding if not drafts[id(one)]]
        rows = self._take_rows(together)
        for one in decoding:
            if one.ended:
                continue  # with another answer of its request, which failed
            if drafts[id(one)]:
                yield from self._guarded(one, partial(self._verify, draft=drafts[id(one)]), emit)
            elif id(one) not in rows:
                yield from self._guarded(one, self._single, emit)
        if left := [one for one in together if id(one) in rows and not one.ended]:
            yield from self._together(left, [rows[id(one)] for one in left], emit)

    def to_row(self, one: Decoding, source: State) -> bool:
        """Let a row hold all its tokens, of which `source` has read those that no row holds yet, so that it can do
        without a state; False where there is no room."""
        return self._join(one, source) is not None

    def sync(self, one: Decoding) -> None:
        """Let its own state hold all its tokens."""
        row = self._row(one)
        if row is not None and one.state is not None and self._batch is not None:
            self._batch.copy_back(row, one.ids, one.state)

    def leave(self, one: Decoding) -> None:
        """Free its row, if it has one; what its own state lacks is copied there first."""
        row = self._row(one)
        if row is None or self._batch is None:
            return
        try:
            self.sync(one)
        finally:
            self._batch.leave(row)

    def row_state(self, one: Decoding) -> State | None:
        """What its row holds, as a state to be read from; None without a row."""
        row = self._row(one)
        if row is None or self._batch is None:
            return None
        return self._batch.view(row, one.ids)

    def rest(self) -> None:
        """Give main memory back while nobody decodes, unless it is little."""
        batch = self._batch
        if batch is not None and not batch.rows and self._decoder.device.name == "cpu" and batch.written > KEPT_BYTES:
            self._batch = None

    def outgrown(self, one: Decoding) -> bool:
        """Whether its next token has no place in a row."""
        return len(one.ids) > self._row_capacity

    def _row(self, one: Decoding) -> Row[Decoding] | None:
        return self._batch.find(one) if self._batch is not None else None

    def _guarded(
        self, one: Decoding, work: Callable[[Decoding, Emit], None], emit: Emit
    ) -> Iterator[tuple[Decoding, Exception]]:
        try:
            work(one, emit)
        except Exception as error:
            yield one, error

    def _alone(self, one: Decoding, emit: Emit) -> None:
        """The only one that decodes."""
        self.sync(one)
        draft = one.propose(self._decoder.most_verified - 1, self.run_costs)
        if draft:
            self._verify(one, emit, draft)
        else:
            self._single(one, emit)

    def _single(self, one: Decoding, emit: Emit) -> None:
        """A step in its own state."""
        self.sync(one)
        state = one.state
        assert state is not None
        started = self._clock()
        (logits,) = self._decoder.step(one.ids[-1:], state)
        seconds = self._clock() - started
        self.run_costs.note(1, seconds)
        self._costs.note(1, seconds)
        state.extend(one.ids[-1:])
        emit(one, one.draw(logits))

    def _verify(self, one: Decoding, emit: Emit, draft: Sequence[int]) -> None:
        """A run over the last token and guesses after it; draws from the model's own logits decide them."""
        self.sync(one)
        state, timings = one.state, one.job.timings
        assert state is not None
        started = self._clock()
        verified = self._decoder.verify([one.ids[-1], *draft], state, one.job.request.cancel)
        self.run_costs.note(1 + len(draft), self._clock() - started)
        accepted = 0
        try:
            for logits, guess in zip(verified.logits, [*draft, None], strict=True):
                step = one.draw(logits)
                emit(one, step)
                right = step.token == guess
                accepted += right
                if not right or one.ended:
                    break
        finally:
            verified.accept(1 + accepted)
        timings.drafted_tokens += len(draft)
        timings.accepted_tokens += accepted

    def _draft(self, one: Decoding, others: int) -> list[int]:
        """Guesses that are worth a run of their own although others step together."""
        if one.state is None:
            return []
        return one.propose(self._decoder.most_verified - 1, self.run_costs, self._costs.speed(others))

    def _take_rows(self, together: Sequence[Decoding]) -> dict[int, Row[Decoding]]:
        """Rows for those who are to step in one run, by their ids; without for those who step alone."""
        rows = {id(one): row for one in together if (row := self._row(one)) is not None}
        bound = {id(one) for one in together if one.state is None}  # a row is all that they have
        fitting = [one for one in together if not self.outgrown(one)]
        fitting = sorted(fitting, key=lambda one: id(one) not in bound)[: self._rows]
        missing = sum(len(one.ids) - (rows[id(one)].length if id(one) in rows else 0) - 1 for one in fitting)
        if not bound and (len(fitting) < 2 or not self._costs.together(len(fitting), missing)):
            return {}
        started = self._clock()
        joined = {id(one): row for one in fitting if (row := self._join(one, one.state)) is not None}
        self._costs.note_copy(missing, self._clock() - started)
        return joined

    def _join(self, one: Decoding, source: State | None) -> Row[Decoding] | None:
        if self.outgrown(one) or self._rows < 2:
            return None
        row = self._row(one)
        if row is not None and (source is None or (row.fresh and row.length >= source.length)):
            return row
        if source is None:
            return None
        try:
            if self._batch is None:
                decoder = self._decoder
                self._batch = Batch(decoder.states, self._row_capacity, self._rows, decoder.device)
            if row is None and len(self._batch.rows) >= self._rows and not self._make_room():
                return None
            return self._batch.join(one, source)
        except MemoryError:
            if self._batch is None:
                log.warning("There is no memory to decode several answers in one run; they take turns.")
                self._rows = 1
            return None  # what is in other rows may be nowhere else

    def _make_room(self) -> bool:
        """Free a row whose owner has a state of its own and did not step with the others."""
        assert self._batch is not None
        for row in self._batch.rows:
            if row.owner.state is not None and not row.fresh:
                self.leave(row.owner)
                return True
        return False

    def _together(
        self, decoding: Sequence[Decoding], rows: Sequence[Row[Decoding]], emit: Emit
    ) -> Iterator[tuple[Decoding, Exception]]:
        batch = self._batch
        assert batch is not None
        taken = batch.prepare(rows)
        started = self._clock()
        try:
            logits = self._decoder.step([row.owner.ids[-1] for row in taken], batch)
        except Exception as error:
            yield from self._failed(decoding, error)
            return
        self._costs.note(len(taken), self._clock() - started)
        stepped = [(row, said) for row, said in zip(taken, logits, strict=True) if any(row is one for one in rows)]
        for row, _ in stepped:
            row.length += 1
        for row, said in stepped:
            if not row.owner.ended:  # with another answer of its request, which failed
                yield from self._guarded(row.owner, partial(self._draw, logits=said), emit)

    def _draw(self, one: Decoding, emit: Emit, logits: Logits) -> None:
        emit(one, one.draw(logits))

    def _failed(self, decoding: Sequence[Decoding], error: Exception) -> Iterator[tuple[Decoding, Exception]]:
        """A run of several failed: who has a state of its own goes on alone, since it may not have been the cause."""
        log.warning("A run of %d answers failed: %s", len(decoding), error)
        self._costs.forbid(len(decoding))
        for one in decoding:
            if one.state is None:
                yield one, error
