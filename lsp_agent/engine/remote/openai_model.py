"""`ChatModel` over any OpenAI-compatible server: our engine's, vLLM, llama.cpp's and others.

What servers do differently is in `dialect` (what is asked) and `replies` (what is answered).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import (
    DEFAULT_OPTIONS,
    ChatOptions,
    Completion,
    Message,
    Sampling,
    Tier,
    TokenScore,
    ToolSchema,
    Usage,
)
from lsp_agent.engine.remote import replies
from lsp_agent.engine.remote.connection import Connection, Reply
from lsp_agent.engine.remote.dialect import Dialect, to_drop
from lsp_agent.engine.remote.families import Family
from lsp_agent.engine.remote.refusals import Refused, our_refusal, refusal
from lsp_agent.engine.tool_calls import message_to_openai, tool_to_openai
from lsp_agent.engine.tool_calls.openai import OURS
from lsp_agent.errors import UnknownModel, Unsupported, UserError

ASKED_AT_ONCE = 4
"""Requests in flight where a server gives one answer a request."""
_NO_AUTO_TOOLS = "enable-auto-tool-choice"
"""vLLM names this option when it was started without a parser of tool calls."""


class OpenAiModel:
    """Implements `lsp_agent.chat_model.ChatModel`. Thread-safe."""

    def __init__(
        self,
        name: str,
        connection: Connection,
        dialect: Dialect,
        *,
        tier: Tier,
        context_length: int,
        file_tokens: tuple[str, str] | None = None,
        infills: bool = True,
        family: Family | None = None,
        stream: bool = False,
        where: str = "The model server",
        key_name: str = "",
    ) -> None:
        """`infills`: whether the model was trained to fill in the middle; `family`: the prompts it wants for that.

        `stream`: have answers sent piece by piece, so that a server that is stuck is told from one that is long about
        it, and no proxy in between loses patience. `where` begins the sentences about what the server refused.
        """
        self.name = name
        self.tier: Tier = tier
        self.context_length = context_length
        self.file_tokens = file_tokens
        self._infills = infills
        self._family = family
        self._stream = stream
        self._where = where
        self._key_name = key_name
        self._connection = connection
        self._dialect = dialect

    @property
    def _ours(self) -> bool:
        return self._dialect.kind == "lsp-agent"

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        tools: Sequence[ToolSchema] = (),
        options: ChatOptions = DEFAULT_OPTIONS,
    ) -> list[Completion]:
        """See `ChatModel.chat`."""
        body: dict[str, Any] = {"messages": [self._message(message) for message in messages]}
        body |= self._dialect.options(options)
        if tools and options.tool_choice != "none":
            body |= self._tools(tools, options.tool_choice)
        else:
            tools = ()
        checked = () if self._ours else tools
        read = partial(replies.completions, tools=checked)
        return self._answers("chat/completions", body, sampling, cancel, n, read)

    def infill(
        self,
        prefix: str,
        suffix: str,
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        options: ChatOptions = DEFAULT_OPTIONS,
    ) -> list[Completion]:
        """See `ChatModel.infill`."""
        if not self._infills:
            raise Unsupported(
                f"{self.name} was not trained to fill in the middle; choose a coder model (`lsp-agent model list`)."
            )
        body = self._dialect.options(options)
        if self._family is not None and self._dialect.kind not in ("lsp-agent", "ollama"):
            return self._raw_infill(self._family, prefix, suffix, sampling, cancel, n, body)
        if "infill" in self._dialect.cannot:
            raise self._no_infill()
        if self._dialect.kind == "llama.cpp":
            body |= {"input_prefix": prefix, "input_suffix": suffix, "prompt": ""}
            path, read = "/infill", replies.llama_infill
        else:
            body |= {"prompt": prefix, "suffix": suffix}
            path, read = "completions", replies.completions
        try:
            return self._answers(path, body, sampling, cancel, n, read)
        except Refused as error:
            if self._ours or not error.about(400, 404, 405, 422, 501):
                raise
            self._dialect.cannot.add("infill")
            raise self._no_infill() from error

    def score(self, text: str, cancel: CancelToken) -> list[TokenScore]:
        """See `ChatModel.score`. Raises `Unsupported` where the server does not tell a text's log probabilities."""
        if "score" in self._dialect.cannot or self._dialect.kind in ("llama.cpp", "ollama"):
            raise self._no_scores()
        # Others answer with one token at least; what is not of the text is left out.
        body = {"prompt": text, "echo": True, "max_tokens": 0 if self._ours else 1, "temperature": 0.0, "logprobs": 1}
        try:
            answer = self._post("completions", body, cancel)
        except Refused as error:
            if self._ours or not error.about(400, 404, 405, 422, 500, 501):
                raise
            answer = None
        scored = replies.scores(answer, text)
        if scored is None:
            self._dialect.cannot.add("score")
            raise self._no_scores()
        return scored

    def close(self) -> None:
        """Close the connection; safe to call twice, and from any thread."""
        self._connection.close()

    def _no_infill(self) -> Unsupported:
        return Unsupported(
            f"{self._where} does not fill in the middle with {self.name}: set backend.family to the model's family."
        )

    def _no_scores(self) -> Unsupported:
        return Unsupported(f"{self._where} does not tell how likely the tokens of a text are.")

    def _message(self, message: Message) -> dict[str, Any]:
        entry = message_to_openai(message)
        if not self._ours:  # strict servers take no field that they do not know
            for call in entry.get("tool_calls", ()):
                call.pop(OURS, None)
        return entry

    def _tools(self, tools: Sequence[ToolSchema], choice: str) -> dict[str, Any]:
        named = choice not in ("auto", "required")
        if named and self._dialect.kind in ("llama.cpp", "ollama"):  # which know no choice by name
            tools, choice = [tool for tool in tools if tool.name == choice], "required"
        if choice == "auto" and "auto tools" in self._dialect.cannot:
            choice = "none"  # the prompt still shows the tools, and the calls are read from the text
        return {"tools": [tool_to_openai(tool) for tool in tools], **self._dialect.tool_choice(choice)}

    def _raw_infill(
        self,
        family: Family,
        prefix: str,
        suffix: str,
        sampling: Sampling,
        cancel: CancelToken,
        n: int,
        body: dict[str, Any],
    ) -> list[Completion]:
        body |= {"prompt": family.infill_prompt(prefix, suffix)}
        ends = (*sampling.stop, *family.ends)
        if self._dialect.kind == "vllm":
            body |= {"skip_special_tokens": False}  # so that the stop texts see them
        answers = self._answers("completions", body, sampling, cancel, n, replies.completions, family.ends)
        return [replies.cut(answer, ends) for answer in answers]

    def _answers(
        self,
        path: str,
        body: Mapping[str, Any],
        sampling: Sampling,
        cancel: CancelToken,
        n: int,
        read: Callable[[Any], list[Completion]],
        ends: Sequence[str] = (),
    ) -> list[Completion]:
        """`n` answers: of one request where the server gives several, else of one after the other."""

        def ask(count: int, number: int = 0) -> list[Completion]:
            wanted = self._dialect.fields(sampling, count, ends)
            if number and "seed" in wanted:
                wanted["seed"] += number
            try:
                answer = self._post(path, {**body, **wanted, **self._streamed(path)}, cancel)
                return [replies.cut(found, sampling.stop) for found in read(answer)]
            except replies.UnreadableAnswerError as error:
                raise UserError(f"{self._where} gave an answer without the API's shape ({error}).") from error

        answers: list[Completion] = []
        if n == 1 or not self._dialect.one_answer:
            try:
                answers = ask(n)[:n]
            except Refused as error:
                if n == 1 or self._ours or not error.about(400, 422, 501):
                    raise
        if not answers:
            answers = ask(1)[:1]
        if len(answers) == n:
            return answers
        self._dialect.one_answer = True
        if sampling.temperature == 0:  # the others would be the same
            return [*answers, *([_without_usage(answers[0])] * (n - len(answers)))]
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:  # after the first, so that they share its prompt's cache
            others = list(pool.map(lambda number: ask(1, number), range(len(answers), n)))
        return [*answers, *(answer for found in others for answer in found[:1])]

    def _streamed(self, path: str) -> dict[str, Any]:
        if not self._stream or path.startswith("/"):
            return {}
        return self._dialect.taken({"stream": True, "stream_options": {"include_usage": True}})

    def _post(self, path: str, body: Mapping[str, Any], cancel: CancelToken) -> Any:
        """Ask until the server takes the request: optional fields that it refuses are left out from then on.

        Raises `Refused` with the first refusal where that does not help, and what `Connection.ask` raises.
        """
        guessed: set[str] = set()
        first: Refused | None = None
        body = {"model": self.name, **body}
        while True:
            reply = self._connection.ask("POST", path, body, cancel)
            if reply.status == 200 and not (isinstance(reply.body, Mapping) and reply.body.get("error")):
                self._dialect.refused |= guessed
                return reply.body
            problem = self._problem(reply, cancel)
            if self._ours or not isinstance(problem, Refused) or not problem.about(400, 422, 500, 501):
                raise problem
            first = first or problem
            left = self._without(body, problem, guessed)
            if left is None:
                raise first
            body = left

    def _without(self, body: Mapping[str, Any], refused: Refused, guessed: set[str]) -> dict[str, Any] | None:
        """`body` with less in it; None where nothing can be left out."""
        if _NO_AUTO_TOOLS in refused.detail and body.get("tools") and "tool_choice" not in body:
            self._dialect.cannot.add("auto tools")
            return {**body, "tool_choice": "none"}
        names, named = to_drop(body, refused.detail)
        if not names or (not named and (refused.about(500) or body.get("n", 1) > 1)):
            return None
        if named:
            self._dialect.refused |= names
        else:
            guessed |= names
        left = {key: value for key, value in body.items() if key not in names}
        if "max_tokens" in names:
            left["max_completion_tokens"] = body["max_tokens"]
        return left

    def _problem(self, reply: Reply, cancel: CancelToken) -> UserError:
        """The sentence about a reply that is no answer."""
        if self._ours:
            return our_refusal(reply)
        problem = refusal(reply, self._where, self._key_name)
        if not isinstance(problem, UnknownModel):
            return problem
        names = replies.model_names(self._connection.ask("GET", "models", None, cancel).body)
        there = f"; it has {', '.join(names)}" if names else ""
        return UnknownModel(f"{self._where} has no model {self.name!r}{there}: set backend.model.")


def _without_usage(answer: Completion) -> Completion:
    return replace(answer, usage=Usage())
