"""The answers of one request, as they are generated or whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Completion, Sampling, ToolSchema, Usage
from lsp_agent.engine.tool_calls import AnswerReader, Piece, new_parser

if TYPE_CHECKING:
    from lsp_agent.engine.engine import Engine


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
    call_format = engine.tokenizer.tool_calls if tools else "none"
    readers = [AnswerReader(new_parser(call_format, tools)) for _ in range(n)]
    logprobs: list[list[float]] = [[] for _ in range(n)]

    def completion(index: int, cut_off: bool) -> Completion:
        tokens, timings = len(logprobs[index]), generation.timings
        usage = Usage(timings.prompt_tokens, timings.cached_tokens, tokens)
        return readers[index].completion(cut_off, usage, sum(logprobs[index]) / tokens if tokens else None)

    for step in generation:
        index, reader = step.index, readers[step.index]
        logprobs[index].append(step.logprob)
        pieces = reader.feed(step.text)
        if step.finish_reason is not None:
            pieces += reader.close(step.finish_reason == "length")
        for piece in pieces:
            yield index, piece
        if step.finish_reason is not None:
            yield index, completion(index, step.finish_reason == "length")
    for index in range(n):
        if not logprobs[index]:  # there was no room for a single token
            yield index, completion(index, cut_off=True)


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
