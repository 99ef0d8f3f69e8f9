"""The answers of one request, as they are generated or whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Completion, Sampling, ToolCall, ToolSchema, Usage
from lsp_agent.engine.request import Step, Timings
from lsp_agent.engine.tool_calls import AnswerReader, Piece, ToolCallFormat, new_parser

if TYPE_CHECKING:
    from lsp_agent.engine.engine import Engine

Parts = list[tuple[int, Piece | Completion]]
"""More of the answers, each piece with its answer's index; an answer's `Completion` is its end."""


class Answers:
    """Reads the steps of one request: `n` answers, text and calls apart. Without `tools` all is text.

    `single_call`: an answer is over when one call of it is complete; `ended` says so, and what is generated after it
    is left out. `remember` is called with each answer and its tokens, so that a later prompt can have just these.
    """

    def __init__(
        self,
        call_format: ToolCallFormat,
        tools: Sequence[ToolSchema],
        n: int,
        timings: Timings,
        single_call: bool = False,
        remember: Callable[[Completion, Sequence[int]], None] | None = None,
    ) -> None:
        used = call_format if tools else "none"
        self._readers = [AnswerReader(new_parser(used, tools)) for _ in range(n)]
        self._logprobs: list[list[float]] = [[] for _ in range(n)]
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self._timings = timings
        self._remember = remember
        self._single_call = single_call
        self.ended = [False] * n

    def feed(self, step: Step) -> Parts:
        """Take a step and give what it settles."""
        index, reader = step.index, self._readers[step.index]
        if self.ended[index]:
            return []
        self._logprobs[index].append(step.logprob)
        self._tokens[index].append(step.token)
        pieces = reader.feed(step.text)
        cut_off = step.finish_reason == "length"
        if step.finish_reason is not None:
            pieces += reader.close(cut_off)
        called = next((place for place, piece in enumerate(pieces) if isinstance(piece, ToolCall)), None)
        parts: Parts = [(index, piece) for piece in pieces]
        if self._single_call and called is not None:
            return [*parts[: called + 1], self._end(index, cut_off=False, first_call=True)]
        return [*parts, self._end(index, cut_off)] if step.finish_reason is not None else parts

    def close(self) -> Parts:
        """End the answers for which there was no room."""
        return [self._end(index, cut_off=True) for index, ended in enumerate(self.ended) if not ended]

    def _end(self, index: int, cut_off: bool, first_call: bool = False) -> tuple[int, Completion]:
        self.ended[index] = True
        tokens, timings = len(self._logprobs[index]), self._timings
        usage = Usage(timings.prompt_tokens, timings.cached_tokens, tokens)
        mean_logprob = sum(self._logprobs[index]) / tokens if tokens else None
        answer = self._readers[index].completion(cut_off, usage, mean_logprob, first_call)
        if self._remember is not None and tokens:
            self._remember(answer, self._tokens[index])
        return index, answer


def stream(
    engine: Engine,
    prompt: Sequence[int],
    sampling: Sampling,
    cancel: CancelToken,
    n: int = 1,
    tools: Sequence[ToolSchema] = (),
) -> Iterator[tuple[int, Piece | Completion]]:
    """Yield the pieces of `n` answers, each with its answer's index, and every answer's `Completion` at its end.

    Without `tools` all is text. Raises as `Engine.generate` and iterating over its result do.
    """
    generation = engine.generate(prompt, sampling, cancel, n=n)
    answers = Answers(engine.tokenizer.tool_calls, tools, n, generation.timings)
    for step in generation:
        yield from answers.feed(step)
    yield from answers.close()


def collect(
    engine: Engine,
    prompt: Sequence[int],
    sampling: Sampling,
    cancel: CancelToken,
    n: int = 1,
    tools: Sequence[ToolSchema] = (),
) -> list[Completion]:
    """Give `n` whole answers; see `stream`. Each one's usage counts the prompt, which is read once (`total_usage`)."""
    answers = {
        index: piece
        for index, piece in stream(engine, prompt, sampling, cancel, n, tools)
        if isinstance(piece, Completion)
    }
    return [answers[index] for index in range(n)]


def total_usage(answers: Sequence[Completion]) -> Usage:
    """Add the answers of one request up; their prompt counts once."""
    first = answers[0].usage
    return Usage(first.prompt_tokens, first.cached_tokens, sum(answer.usage.completion_tokens for answer in answers))
