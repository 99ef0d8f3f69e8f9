"""What OpenAI-compatible servers understand, and how each wants to be asked.

The differences were read from the servers' own documentation and sources: vLLM (no `suffix`; `structured_outputs`,
`priority`, top-k and so on beside OpenAI's fields), llama.cpp's server (`repeat_penalty`; neither `suffix` nor `echo`;
`/infill`), Ollama (templates of its own around plain prompts; `suffix`). Of the rest, what a server refuses is found
out by asking.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lsp_agent.chat_model import AnswerFormat, ChatOptions, Sampling
from lsp_agent.engine.request import INTERACTIVE
from lsp_agent.errors import Unsupported

Kind = Literal["lsp-agent", "vllm", "llama.cpp", "ollama", "other"]

_OWNERS: dict[str, Kind] = {
    "lsp-agent": "lsp-agent",
    "vllm": "vllm",
    "llamacpp": "llama.cpp",
    "llama.cpp": "llama.cpp",
    "library": "ollama",
}
SPEED = ("prediction", "priority")
"""Fields that change only how soon an answer comes."""
STYLE = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "repeat_penalty",
    "repeat_last_n",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "seed",
    "skip_special_tokens",
)
"""Fields that change which of the fitting answers is drawn: better another one than none."""
STREAM = ("stream_options",)
_OPTIONAL = SPEED + STYLE + STREAM
MOST_STOPS = 4
"""How many stop texts OpenAI's API takes; the rest are cut off here."""
PENALISED = 4096
"""How many of the last tokens a repetition is looked for in, where a server wants a number."""


def kind_of(owner: object) -> Kind:
    """Tell the server by the `owned_by` of its models."""
    return _OWNERS.get(str(owner).lower(), "other")


@dataclass
class Dialect:
    """What one server understands; grows with what it refuses. Shared between threads: all changes only add."""

    kind: Kind = "other"
    refused: set[str] = field(default_factory=set)
    """Optional fields that it does not take."""
    one_answer: bool = False
    """It gives one answer a request, whatever `n` says."""
    cannot: set[str] = field(default_factory=set)
    """What it was found not to do at all: `score`, `infill`."""

    def fields(self, sampling: Sampling, n: int, ends: Sequence[str] = ()) -> dict[str, Any]:
        """The sampling fields of a body; `ends` are further stop texts.

        All are sent: servers have defaults of their own, or the model's makers'.
        """
        body: dict[str, Any] = {**asdict(sampling), "stop": [*sampling.stop, *ends]}
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias}
        for name in ("seed", "frequency_penalty", "presence_penalty", "logit_bias"):
            if body[name] in (None, 0.0, {}):  # the API's own defaults
                del body[name]
        if self.kind == "llama.cpp":
            body["repeat_penalty"] = body.pop("repetition_penalty")
            if body["repeat_penalty"] != 1:
                body["repeat_last_n"] = PENALISED  # it takes 64 where it is not told, and no word for all
        elif self.kind != "lsp-agent":
            body["stop"] = body["stop"][: MOST_STOPS if self.kind == "other" else None]
        if not body["stop"] and self.kind != "lsp-agent":
            del body["stop"]
        if n > 1:
            body["n"] = n
        if "max_tokens" in self.refused:
            body["max_completion_tokens"] = body.pop("max_tokens")
        return self.taken(body)

    def options(self, options: ChatOptions) -> dict[str, Any]:
        """The fields of `options`, but for the tools'. Raises `Unsupported`."""
        body: dict[str, Any] = {}
        if options.prediction:
            body["prediction"] = {"type": "content", "content": options.prediction}
        if options.urgent and self.kind in ("lsp-agent", "vllm"):
            body["priority"] = INTERACTIVE
        return {**self.taken(body), **self._answer_format(options.answer_format)}

    def tool_choice(self, choice: str) -> dict[str, Any]:
        """The field that says whether a tool may or must be called; none for the default."""
        if choice == "auto":
            return {}
        if choice in ("none", "required"):
            return {"tool_choice": choice}
        return {"tool_choice": {"type": "function", "function": {"name": choice}}}

    def taken(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """`body` without what the server was found to refuse."""
        return {key: value for key, value in body.items() if key not in self.refused or key == "max_tokens"}

    def _answer_format(self, wanted: AnswerFormat) -> dict[str, Any]:
        kind, value = wanted.kind, wanted.value
        if kind == "text":
            return {}
        if kind == "json":
            return {"response_format": {"type": "json_object"}}
        if kind == "json_schema":
            named = {"name": "answer", "schema": json.loads(value), "strict": True}
            return {"response_format": {"type": "json_schema", "json_schema": named}}
        names = {"regex": "regex", "lark": "grammar", "python_function": "python_function"}
        if self.kind == "lsp-agent" or (self.kind == "vllm" and kind != "python_function"):
            return {"structured_outputs": {names[kind]: value}}
        raise Unsupported(f"This model server cannot keep answers to a {kind.replace('_', ' ')}; use a JSON schema.")


def to_drop(body: Mapping[str, Any], message: str) -> tuple[set[str], bool]:
    """Which optional fields to leave out after a refusal, and whether the server named them.

    Where it names none, all that change only the speed are tried first, then all optional ones. Empty: nothing is left.
    """
    optional = [name for name in _OPTIONAL if name in body]
    if "max_tokens" in body and "max_completion_tokens" in message:
        return {"max_tokens"}, True
    named = {name for name in optional if re.search(rf"\b{name}\b", message)}
    if named:
        return named, True
    return {name for name in optional if name in SPEED} or set(optional), False
