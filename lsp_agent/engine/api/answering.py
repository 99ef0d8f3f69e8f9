"""From the engine's steps to an answer's JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lsp_agent.chat_model import Completion, Usage
from lsp_agent.engine.answers import Answers
from lsp_agent.engine.api import shapes
from lsp_agent.engine.api.logprobs import TokenLog, scored_tokens
from lsp_agent.engine.api.prepare import Prepared
from lsp_agent.engine.request import Step, Timings
from lsp_agent.engine.tool_calls import Piece

if TYPE_CHECKING:
    from lsp_agent.engine.engine import Engine
    from lsp_agent.engine.scheduling.generation import Generation
    from lsp_agent.engine.scoring import Scoring

Told = Step | Exception | None
"""What a generation tells: its steps, then its end, with what went wrong if anything did."""


class Inbox:
    """Brings the steps of several generations from the engine's thread to the event loop's."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()
        self._open = 0

    def open(self) -> Callable[[Told], None]:
        """What the next generation calls, from any thread."""
        number = self._open
        self._open += 1

        def tell(told: Told) -> None:
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, told))
            except RuntimeError:  # the loop has ended, and with it whoever asked
                return

        return tell

    def fail(self, error: Exception) -> None:
        """End with an error, from the loop's own thread."""
        self._queue.put_nowait((0, error))

    async def next(self) -> tuple[int, Step] | None:
        """The next step and its generation's number; None when all have ended. Raises what went wrong."""
        while self._open:
            number, told = await self._queue.get()
            if isinstance(told, Exception):
                raise told
            if told is not None:
                return number, told
            self._open -= 1
        return None


class Answering:
    """Turns the steps of one HTTP request into choices, answers numbered through all of its prompts."""

    def __init__(self, engine: Engine, prepared: Prepared, choices: shapes.ChatChoices | shapes.TextChoices) -> None:
        self._engine, self._prepared, self._choices = engine, prepared, choices
        self._firsts: list[int] = []
        self._answers: list[Answers] = []
        self._timings: list[Timings] = []
        self._logs: list[TokenLog | None] = []
        self._generations: list[Generation] = []
        self._unremembered: list[Callable[[], None]] = []
        self.ended: dict[int, Completion] = {}

    def begin(self, generation: Generation) -> None:
        """Take on the generation of the next prompt."""
        asked = self._prepared.requests[len(self._answers)]
        tokenizer = self._engine.tokenizer
        remember = partial(self._note, asked.prompt) if self._prepared.remembered else None
        self._firsts.append(len(self._logs))
        self._generations.append(generation)
        self._timings.append(generation.timings)
        self._answers.append(
            Answers(
                tokenizer.tool_calls,
                self._prepared.tools,
                asked.n,
                generation.timings,
                self._prepared.single_call,
                remember,
            )
        )
        offset = len(self._prepared.texts[len(self._answers) - 1]) if self._prepared.texts else 0
        for _ in range(asked.n):
            log = TokenLog(tokenizer, asked.stop_ids, offset) if self._prepared.logprobs else None
            self._logs.append(log)

    def echo(self, scorings: Sequence[Scoring | None]) -> None:
        """Let every answer begin with its prompt."""
        assert isinstance(self._choices, shapes.TextChoices)
        index = 0
        for asked, text, scoring in zip(self._prepared.requests, self._prepared.texts, scorings, strict=True):
            tokens = scored_tokens(self._engine.tokenizer, asked.prompt, scoring) if scoring else []
            for _ in range(asked.n):
                self._choices.echo(index, text, tokens)
                index += 1

    def end_unasked(self) -> list[tuple[int, Completion]]:
        """End answers that were to have no tokens: only their prompts were asked about."""
        self._timings = [Timings(prompt_tokens=len(asked.prompt)) for asked in self._prepared.requests]
        parts = [(index, Completion("", "length", Usage())) for index in range(self._prepared.answers)]
        self.ended |= dict(parts)
        return parts

    def feed(self, number: int, step: Step) -> list[tuple[int, Piece | Completion]]:
        """Take a step of generation `number` and give what it settles."""
        answers, first = self._answers[number], self._firsts[number]
        if answers.ended[step.index]:
            return []
        log = self._logs[first + step.index]
        if log is not None:
            self._choices.note(first + step.index, log.feed(step))
        parts = answers.feed(step)
        if answers.ended[step.index] and step.finish_reason is None:
            self._generations[number].finish(step.index)
        return self._numbered(first, parts)

    def _note(self, prompt: Sequence[int], answer: Completion, tokens: Sequence[int]) -> None:
        self._unremembered.append(partial(self._engine.tokenizer.answers.remember, prompt, answer, list(tokens)))

    def take_unremembered(self) -> Callable[[], None] | None:
        """What remembers the answers that have just ended, if any: slow, and to be done before they are given out."""
        jobs, self._unremembered = self._unremembered, []
        return partial(_call_all, jobs) if jobs else None

    def close(self) -> list[tuple[int, Piece | Completion]]:
        """Give the ends of answers for which there was no room."""
        closed = [self._numbered(first, one.close()) for first, one in zip(self._firsts, self._answers, strict=True)]
        return [part for parts in closed for part in parts]

    def _numbered(
        self, first: int, parts: list[tuple[int, Piece | Completion]]
    ) -> list[tuple[int, Piece | Completion]]:
        numbered = [(first + index, piece) for index, piece in parts]
        self.ended |= {index: piece for index, piece in numbered if isinstance(piece, Completion)}
        return numbered

    def whole(self) -> list[dict[str, Any]]:
        """All choices."""
        return [self._choices.whole(index, self.ended[index]) for index in sorted(self.ended)]

    @property
    def timings(self) -> list[Timings]:
        """Those of the prompts."""
        return self._timings

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers that have ended."""
        return sum(answer.usage.completion_tokens for answer in self.ended.values())

    def usage(self) -> dict[str, Any]:
        """The token counts, once all have ended."""
        return shapes.usage(self._timings, self.completion_tokens)


def _call_all(jobs: Sequence[Callable[[], None]]) -> None:
    for job in jobs:
        job()
