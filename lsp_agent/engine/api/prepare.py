"""From a checked body to what is asked of the engine: tokens, masks, sampling. Slow; runs in threads of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import AnswerFormat, Sampling, ToolSchema
from lsp_agent.engine.api.chat_requests import ChatRequest
from lsp_agent.engine.api.errors import ApiError
from lsp_agent.engine.api.requests import MAX_ANSWERS, CompletionRequest, GenerationFields
from lsp_agent.engine.constraints import Constraint, compile_format, constraint_for_tools
from lsp_agent.engine.request import Request
from lsp_agent.errors import PromptTooLong

if TYPE_CHECKING:
    from lsp_agent.engine.engine import Engine
    from lsp_agent.engine.service.catalog import ServedModel

COMPLETION_TOKENS = 16
"""Tokens of `/v1/completions` where the request does not say, as in OpenAI's API."""
LONGEST_TOKEN = 256
"""Characters. A text that would not fit even in such tokens need not be tokenised to know it."""
STEADY = 16
"""Tokens before the cursor that the next key may change, as the tokenizer merges what was typed with what is there."""


@dataclass(frozen=True)
class Asker:
    """Who asks, as which the engine is fair to them, and how they take it back."""

    client: str
    cancel: CancelToken


@dataclass(frozen=True)
class Prepared:
    """One HTTP request's questions, a `Request` a prompt, each answered as often.

    `tools`, `single_call`: see `Answers`. `logprobs`: log probabilities are wanted. `remembered`: the answers go on in
    later prompts. `texts` are the prompts as they were given, and `scored` says whether to score them.
    """

    requests: list[Request]
    logprobs: bool
    tools: tuple[ToolSchema, ...] = ()
    single_call: bool = False
    remembered: bool = False
    texts: tuple[str, ...] = ()
    scored: bool = False

    @property
    def answers(self) -> int:
        """How many answers there will be."""
        return sum(request.n for request in self.requests)


def prepare_chat(engine: Engine, model: ServedModel, body: ChatRequest, asker: Asker) -> Prepared:
    """A conversation; raises `ApiError` and `UserError`."""
    tokenizer = engine.tokenizer
    tools, choice = body.choice()
    parallel = body.parallel_tool_calls is not False
    form = body.answer_format()
    if tools:
        # An answer that has to be a call has no text that the form could be of.
        of_text = form if choice == "auto" else AnswerFormat()
        constraint = constraint_for_tools(tools, choice, tokenizer.tool_calls, tokenizer, parallel, of_text)
    else:
        constraint = compile_format(form, tokenizer)
    conversation = body.conversation()
    _check_size(engine, sum(len(message["content"]) for message in conversation))
    prompt = engine.chat_prompt(conversation, tools)
    longest = body.max_completion_tokens or body.max_tokens or engine.context_length
    make = partial(_request, engine, body, asker, body.sampling(model.sampling, longest), constraint, body.top)
    return Prepared(
        [make(prompt.ids, prompt.boundaries)],
        bool(body.logprobs),
        tuple(tools),
        single_call=not parallel,
        remembered=True,
    )


def prepare_text(engine: Engine, model: ServedModel, body: CompletionRequest, asker: Asker) -> Prepared:
    """Prompts to go on with, a gap to fill, or a text to score; raises `ApiError` and `UserError`."""
    if body.suffix is not None and body.echo:
        raise ApiError("echo: cannot be sent with suffix.", param="echo")
    if body.best_of not in (None, body.n):
        raise ApiError("best_of: this engine gives all answers that it makes; send n.", param="best_of")
    if len(body.prompt) * body.n > MAX_ANSWERS:
        raise ApiError(f"n: {MAX_ANSWERS} answers may be asked for at once, of all prompts.", param="n")
    longest = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    constraint = compile_format(body.answer_format(), engine.tokenizer)
    sampling = body.sampling(model.sampling, longest)
    make = partial(_request, engine, body, asker, sampling, constraint, body.logprobs or 0)
    requests, texts = [], []
    for number, prompt in enumerate(body.prompt):
        if body.suffix is None:
            ids = _ids(engine, prompt, f"prompt[{number}]")
            cursor = len(ids)
        else:
            if model.infills is False:
                raise ApiError("suffix: this model was not trained to fill in the middle.", param="suffix")
            if not isinstance(prompt, str):
                raise ApiError("suffix: send the prompt as text.", param="prompt")
            _check_size(engine, len(prompt) + len(body.suffix))
            ids = engine.infill_prompt(prompt, body.suffix)
            cursor = ids.index(engine.tokenizer.fim["suffix"])
        requests.append(make(ids, [cursor - STEADY] if cursor > STEADY else []))
        texts.append(prompt if isinstance(prompt, str) else spelled_text(engine, prompt))
    scored = body.echo and body.logprobs is not None
    return Prepared(requests, body.logprobs is not None, texts=tuple(texts) if body.echo else (), scored=scored)


def _check_size(engine: Engine, characters: int) -> None:
    if characters > engine.context_length * LONGEST_TOKEN:
        message = f"The prompt has {characters} characters and the context holds {engine.context_length} tokens"
        raise PromptTooLong(f"{message}; shorten the prompt.")


def _ids(engine: Engine, prompt: str | list[int], param: str) -> list[int]:
    if isinstance(prompt, str):
        _check_size(engine, len(prompt))
        ids = engine.tokenizer.encode(prompt)
    else:
        check_tokens(engine, prompt, param)
        ids = prompt
    if not ids:
        raise ApiError(f"{param}: the prompt is empty; give the model something to read.", param="prompt")
    return ids


def check_tokens(engine: Engine, ids: list[int], param: str) -> None:
    """Raise `ApiError` for tokens that the model does not have."""
    vocabulary = engine.config.vocabulary
    if any(token >= vocabulary for token in ids):
        raise ApiError(f"{param}: the model has {vocabulary} tokens, numbered from 0.", param=param)


def spelled_text(engine: Engine, ids: list[int]) -> str:
    """Tokens as text, control tokens by their names."""
    return b"".join(map(engine.tokenizer.spelled, ids)).decode(errors="replace")


def _request(
    engine: Engine,
    body: GenerationFields,
    asker: Asker,
    sampling: Sampling,
    constraint: Callable[[], Constraint] | None,
    top: int,
    ids: Sequence[int],
    boundaries: Sequence[int],
) -> Request:
    if body.ignore_eos and constraint is not None:
        raise ApiError("ignore_eos: an answer of a given form must be able to end.", param="ignore_eos")
    check_tokens(engine, [token for token, _ in sampling.logit_bias], "logit_bias")
    ends = frozenset() if body.ignore_eos else engine.stop_ids
    return Request(
        prompt=ids,
        sampling=sampling,
        cancel=asker.cancel,
        n=body.n,
        stop_ids=ends | frozenset(body.stop_token_ids or ()),
        boundaries=boundaries,
        prediction=engine.tokenizer.encode_text(body.prediction.text) if body.prediction else (),
        constraint=constraint,
        priority=body.priority,
        client=asker.client,
        top=top,
    )
