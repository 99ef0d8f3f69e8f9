"""The small protocol between the agent and whatever runs the model.

The agent knows nothing of ONNX, HTTP or tokenizers: it sees a `ChatModel`. The engine's client implements it, and so
does the scripted model of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from lsp_agent.cancel import CancelToken

Tier = Literal["small", "medium", "large"]
"""What a model can be asked to do: small (up to 3B, fixed pipeline), medium (7 to 14B), large (tools, long horizon)."""


@dataclass(frozen=True)
class ToolSchema:
    """One tool. `parameters` is the JSON schema (an object schema) of its arguments.

    Names outside `properties` are refused unless the schema allows them: it has no `properties`, or it says
    `additionalProperties`. `strict`: calls of it are decoded so that they obey the schema.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schema of each declared parameter."""
        return self.parameters.get("properties") or {}

    @property
    def required(self) -> Sequence[str]:
        """The parameters that a call must give."""
        return self.parameters.get("required") or ()

    def schema_of(self, parameter: str) -> Mapping[str, Any] | None:
        """Give the schema of one parameter, or None when the tool has no such parameter."""
        if parameter in self.properties:
            declared = self.properties[parameter]
            return declared if isinstance(declared, Mapping) else {}
        additional = self.parameters.get("additionalProperties", not self.properties)
        if isinstance(additional, Mapping):
            return additional
        return {} if additional else None


class Problem(StrEnum):
    """Why a call cannot be run as it stands."""

    UNKNOWN_TOOL = "unknown_tool"
    UNKNOWN_PARAMETER = "unknown_parameter"
    MISSING_PARAMETER = "missing_parameter"
    DUPLICATE_PARAMETER = "duplicate_parameter"
    INVALID_VALUE = "invalid_value"
    MALFORMED = "malformed"
    CUT_OFF = "cut_off"


MALFORMED = frozenset({Problem.MALFORMED, Problem.CUT_OFF, Problem.DUPLICATE_PARAMETER})


class Repair(StrEnum):
    """A slip of form that the parser mended without asking the model again; counted apart in evaluations."""

    MISSING_OPENER = "missing_opener"
    DOUBLED_OPENER = "doubled_opener"
    MISSING_CLOSER = "missing_closer"
    DOUBLED_CLOSER = "doubled_closer"
    STRAY_TEXT = "stray_text"
    CODE_FENCE = "code_fence"
    LENIENT_JSON = "lenient_json"


@dataclass(frozen=True)
class ToolCallError:
    """One thing wrong with a call; `message` is a sentence to show to the model."""

    problem: Problem
    message: str
    parameter: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """One call as the model made it. Run it only when `errors` is empty.

    `raw` is the exact span of the answer that it came from (empty when it came from elsewhere); `arguments` holds
    JSON values. After errors `arguments` holds what could be read, and `name` is empty when not even that could.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    raw: str = ""
    errors: tuple[ToolCallError, ...] = ()
    repairs: tuple[Repair, ...] = ()

    @property
    def malformed(self) -> bool:
        """Whether name and arguments are not what the model meant to say: such a call is no more than text."""
        return any(error.problem in MALFORMED for error in self.errors)

    @property
    def error_text(self) -> str:
        """All errors, one sentence a line: the tool's answer to the model. Empty when the call can be run."""
        return "\n".join(error.message for error in self.errors)


class Message(TypedDict):
    """One chat message; `role` is system, user, assistant, or tool for a call's result."""

    role: str
    content: str
    tool_calls: NotRequired[Sequence[ToolCall]]
    """What the assistant called, after its `content`."""
    tool_call_id: NotRequired[str]
    """The call whose result a tool's message is."""


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. `temperature` 0 is greedy; the other filters apply in the order top-k, top-p, min-p.

    `repetition_penalty` is over prompt and answer; `frequency_penalty` (for each time that a token was said) and
    `presence_penalty` (once) are taken off logits of the answer's tokens, as OpenAI's API defines them. `logit_bias`:
    tokens and what is added to their logits.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()


FormatKind = Literal["text", "json", "json_schema", "regex", "lark", "python_function"]


@dataclass(frozen=True)
class AnswerFormat:
    """What an answer must look like. `value`: nothing for text and (any) json; a JSON schema as JSON text; a regular
    expression for the whole answer; a grammar in llguidance's Lark; a Python signature, `def name(…) -> …:`.
    """

    kind: FormatKind = "text"
    value: str = ""


@dataclass(frozen=True)
class ChatOptions:
    """How to answer, beyond sampling. A server that knows one of these not does without it where it changes only speed.

    `prediction`: text that much of the answer is expected to repeat. `tool_choice`: auto, none, required, or the name
    of the tool that must be called. `urgent`: somebody waits at the cursor.
    """

    prediction: str = ""
    answer_format: AnswerFormat = AnswerFormat()
    tool_choice: str = "auto"
    urgent: bool = False


DEFAULT_OPTIONS = ChatOptions()


@dataclass(frozen=True)
class Usage:
    """Tokens of one request. `cached_tokens` of the `prompt_tokens` were not read again."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Completion:
    """One answer. `mean_logprob`: mean natural-log probability of its tokens under the model, before any filter.

    `text` and the calls' `raw` spans together are all that the model said. `problems` tell what is wrong with calls
    that could not be read (`ToolCall.malformed`) and are therefore part of `text`.
    """

    text: str
    finish_reason: Literal["stop", "length", "tool_calls", "cancelled"]
    usage: Usage = field(default_factory=Usage)
    mean_logprob: float | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    problems: tuple[ToolCallError, ...] = ()


@dataclass(frozen=True)
class TokenScore:
    """One token of a scored text: characters [start, end) and its natural-log probability given all before it."""

    start: int
    end: int
    logprob: float


class ChatModel(Protocol):
    """A loaded model. Every call blocks its thread, and returns within one decode step of `cancel`.

    Raises `lsp_agent.errors.Cancelled` when cancelled and `UserError` when the model cannot answer (too long a
    prompt, an engine that died).
    """

    @property
    def name(self) -> str:
        """The model's short name, as in its manifest."""

    @property
    def tier(self) -> Tier:
        """The model's capability tier."""

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""

    @property
    def file_tokens(self) -> tuple[str, str] | None:
        """Special tokens in front of a repository's name and of each file's path; None: the model has none."""

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        tools: Sequence[ToolSchema] = (),
        options: ChatOptions = DEFAULT_OPTIONS,
    ) -> list[Completion]:
        """Answer a conversation `n` times. The model may call the `tools`, in the format that it was trained on."""

    def infill(
        self,
        prefix: str,
        suffix: str,
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        options: ChatOptions = DEFAULT_OPTIONS,
    ) -> list[Completion]:
        """Fill in the middle between `prefix` and `suffix`, `n` times.

        `prefix` may hold whole context files in front, written with the model's own file separators by
        `lsp_agent.agent.prompts`.
        """

    def score(self, text: str, cancel: CancelToken) -> list[TokenScore]:
        """Give each token of `text` its log probability; the first token, having no context, is left out."""

    def close(self) -> None:
        """Free the model; safe to call twice."""
