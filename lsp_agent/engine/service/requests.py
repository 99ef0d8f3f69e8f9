"""Bodies of requests, checked: unknown fields are refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lsp_agent.chat_model import Message, Sampling, ToolSchema
from lsp_agent.engine.tool_calls import message_from_openai, tool_from_openai


class SamplingFields(BaseModel):
    """The sampling fields that both kinds of request share."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    max_tokens: int = Field(256, ge=0)
    temperature: float = Field(0.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    seed: int | None = None
    stop: list[str] = Field(default_factory=list)
    n: int = Field(1, ge=1, le=32)

    def sampling(self) -> Sampling:
        """The fields as a `Sampling`."""
        fields = self.model_dump(include=set(Sampling.__dataclass_fields__) - {"stop"})
        return Sampling(**fields, stop=tuple(self.stop))


class CompletionRequest(SamplingFields):
    """Body of `/v1/completions`."""

    prompt: str
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = None


class _Part(BaseModel):
    """A piece of a message; fields of other makers' are let through, since histories carry them along."""

    model_config = ConfigDict(extra="allow")


class _TextPart(_Part):
    type: Literal["text"]
    text: str


class _CalledFunction(_Part):
    name: str
    arguments: str = "{}"


class _Call(_Part):
    id: str
    type: Literal["function"] = "function"
    function: _CalledFunction


class _ChatMessage(_Part):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | list[_TextPart] | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None


class _Function(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: _Function


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class ChatRequest(SamplingFields):
    """Body of `/v1/chat/completions`."""

    messages: list[_ChatMessage] = Field(min_length=1)
    tools: list[_Tool] = Field(default_factory=list)
    tool_choice: Literal["none", "auto"] = "auto"
    stream: bool = False
    stream_options: _StreamOptions = Field(default_factory=_StreamOptions)

    def conversation(self) -> list[Message]:
        """The messages."""
        return [message_from_openai(message.model_dump(exclude_none=True)) for message in self.messages]

    def offered(self) -> list[ToolSchema]:
        """The tools that the model may call."""
        if self.tool_choice == "none":
            return []
        return [tool_from_openai(tool.model_dump(exclude_none=True)) for tool in self.tools]
