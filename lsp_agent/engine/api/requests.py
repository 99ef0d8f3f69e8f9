"""Bodies of requests, checked: unknown fields are refused; `docs/api.md` says which are ignored on purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from lsp_agent.chat_model import AnswerFormat, Sampling
from lsp_agent.engine.api.errors import ApiError

MAX_ANSWERS = 32
MAX_PROMPTS = 32
MAX_STOPS = 16
MAX_TOP = 20
MAX_BIASES = 1024
MAX_SCHEMA = 1 << 18
"""Characters of a schema, an expression or a grammar."""
MAX_TEXTS = 4096
LEAST_TEMPERATURE = 1e-3
"""Below it all draws are the best token, and dividing by it leaves the range of numbers."""
DEFAULTS = ("temperature", "top_p", "top_k", "min_p")
"""What a model's makers may recommend, for requests that do not say."""


def _listed(value: Any) -> Any:
    if not isinstance(value, str | list | None):
        raise ValueError("give a text, or a list of texts")
    return [value] if isinstance(value, str) else value


class Body(BaseModel):
    """A JSON object of the API."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)


class Part(Body):
    """A piece of an object that other makers extend: histories carry their fields along."""

    model_config = ConfigDict(extra="ignore")


Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]


class TextPart(Part):
    """A part of a content. Parts that are no text are refused."""

    type: Literal["text"]
    text: str


def parts(value: Any) -> Any:
    """A content's parts, which may be given as one text."""
    if not isinstance(value, str | list | None):
        raise ValueError("give a text, or a list of parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[list[TextPart], BeforeValidator(parts)]


class Prediction(Body):
    """What much of the answer is expected to repeat."""

    type: Literal["content"]
    content: Content

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(part.text for part in self.content)


class JsonSchema(Body):
    """A schema and its name."""

    name: str
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way to say what an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's way to say what an answer must look like, and a Python function's signature besides."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=MAX_TEXTS)
    grammar: str | None = None
    python_function: str | None = None


class StreamOptions(Body):
    """`include_obfuscation` is taken and ignored: nobody listens on a socket of one's own."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class GenerationFields(Body):
    """The fields that both kinds of request share; those of the last group are ignored."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_ANSWERS)
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)

    max_tokens: int | None = Field(None, ge=0)
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS), BeforeValidator(_listed)] | None = None
    stop_token_ids: list[Token] | None = Field(None, max_length=MAX_STOPS)
    ignore_eos: bool = False
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prediction: Prediction | None = None
    priority: int = Field(0, ge=-100, le=100)
    user: str | None = None

    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def sampling(self, recommended: Mapping[str, float], longest: int) -> Sampling:
        """How to draw: what was asked for, else what is `recommended`, else the API's own defaults."""
        drawn: dict[str, Any] = {"temperature": 1.0}
        drawn |= {name: recommended[name] for name in DEFAULTS if name in recommended}
        fields = (*DEFAULTS, "repetition_penalty", "frequency_penalty", "presence_penalty", "seed")
        drawn |= {name: value for name in fields if (value := getattr(self, name)) is not None}
        if drawn["temperature"] < LEAST_TEMPERATURE:
            drawn["temperature"] = 0.0
        drawn["top_k"] = max(int(drawn.get("top_k", 0)), 0)
        if self.logit_bias:
            drawn["logit_bias"] = tuple(self.logit_bias.items())
        return Sampling(max_tokens=longest, stop=tuple(self.stop or ()), **drawn)

    def answer_format(self) -> AnswerFormat:
        """What the answers must look like; raises `ApiError`."""
        given = [form for form in (self._of_response_format(), *self._of_structured_outputs()) if form.kind != "text"]
        if len(given) > 1:
            message = "structured_outputs: ask for one form of the answer, not for several."
            raise ApiError(message, param="structured_outputs")
        (form,) = given or [AnswerFormat()]
        if len(form.value) > MAX_SCHEMA:
            raise ApiError(f"A schema or grammar may have {MAX_SCHEMA} characters; shorten it.", code="schema_too_long")
        return form

    def _of_response_format(self) -> AnswerFormat:
        asked = self.response_format
        if asked is None or asked.type == "text":
            return AnswerFormat()
        if asked.type == "json_object":
            return AnswerFormat("json")
        if asked.json_schema is None:
            param = "response_format.json_schema"
            raise ApiError(f"{param}: the schema is missing.", param=param, code="missing_required_parameter")
        return AnswerFormat("json_schema", _text(asked.json_schema.json_schema or {}, "response_format.json_schema"))

    def _of_structured_outputs(self) -> list[AnswerFormat]:
        asked, forms = self.structured_outputs, list[AnswerFormat]()
        if asked is None:
            return forms
        if asked.json_ is not None:
            schema = asked.json_ if isinstance(asked.json_, str) else _text(asked.json_, "structured_outputs.json")
            forms.append(AnswerFormat("json_schema", schema))
        if asked.json_object:
            forms.append(AnswerFormat("json"))
        if asked.regex is not None:
            forms.append(AnswerFormat("regex", asked.regex))
        if asked.choice is not None:
            forms.append(AnswerFormat("lark", "start: " + " | ".join(map(json.dumps, asked.choice))))
        if asked.grammar is not None:
            forms.append(AnswerFormat("lark", asked.grammar))
        if asked.python_function is not None:
            forms.append(AnswerFormat("python_function", asked.python_function))
        return forms


def _text(schema: Mapping[str, Any], param: str) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ApiError(f"{param}: numbers must be finite.", param=param, code="invalid_value") from None


def _prompts(value: Any) -> Any:
    """One prompt, a text or token ids, where a list of prompts is meant."""
    if not isinstance(value, str | list):
        raise ValueError("give a text, token ids, or a list of either")
    single = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
    return [value] if single else value


Prompt = str | list[Token]


class CompletionRequest(GenerationFields):
    """Body of `/v1/completions`."""

    prompt: Annotated[list[Prompt], Field(min_length=1, max_length=MAX_PROMPTS), BeforeValidator(_prompts)]
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    best_of: int | None = None


class DetokenizeRequest(Body):
    """Body of `/detokenize`, vLLM's."""

    model: str | None = None
    tokens: list[Token]
