"""The body of a chat, checked: messages, tools and the choice between them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, TypeAdapter

from lsp_agent.chat_model import Message, ToolSchema
from lsp_agent.engine.api.errors import ApiError
from lsp_agent.engine.api.requests import (
    MAX_SCHEMA,
    MAX_TEXTS,
    MAX_TOP,
    Body,
    GenerationFields,
    Part,
    TextPart,
    parts,
)
from lsp_agent.engine.tool_calls import message_from_openai, tool_from_openai

MAX_TOOLS = 128


def _parts(value: Any) -> Any:
    """Parts of a message's content; what an assistant refused to say is text."""
    return [
        {"type": "text", "text": part.get("refusal")}
        if isinstance(part, dict) and part.get("type") == "refusal"
        else part
        for part in parts(value) or ()
    ]


class CalledFunction(Part):
    """What an earlier answer called."""

    name: str
    arguments: str = "{}"


class Call(Part):
    """An entry of an earlier answer's `tool_calls`, with what this engine told of it."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    ours: dict[str, Any] | None = Field(None, alias="lsp_agent")


class ChatMessage(Part):
    """One message. `developer` is the newer name of `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], BeforeValidator(_parts)] = Field(default_factory=list)
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None


class Function(Body):
    """A function that may be called."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """An entry of `tools`."""

    type: Literal["function"]
    function: Function


class Named(Part):
    """A function's name."""

    name: str


class NamedTool(Body):
    """The one tool to call."""

    type: Literal["function"]
    function: Named


class AllowedTools(Body):
    """Of the tools, those that may be called now."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedToolChoice(Body):
    """OpenAI's wrapper of the allowed tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _kind_of_choice(value: Any) -> str:
    if isinstance(value, str):
        return "mode"
    return "allowed" if isinstance(value, dict) and value.get("type") == "allowed_tools" else "named"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")]
    | Annotated[NamedTool, Tag("named")]
    | Annotated[AllowedToolChoice, Tag("allowed")],
    Discriminator(_kind_of_choice),
]


class Conversation(Body):
    """Messages and tools, as a chat and `/tokenize` take them."""

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_TEXTS)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)

    def conversation(self) -> list[Message]:
        """The messages, whose calls keep what this engine told of them."""
        messages = []
        for message in self.messages:
            entry = message.model_dump(exclude_none=True, by_alias=True)
            entry["role"] = "system" if message.role == "developer" else message.role
            messages.append(message_from_openai(entry))
        return messages

    def schemas(self) -> list[ToolSchema]:
        """All `tools`; raises `ApiError` for those that are too many characters, or two of one name."""
        tools = self.tools or []
        names = [tool.function.name for tool in tools]
        for number, tool in enumerate(tools):
            param = f"tools[{number}].function"
            if tool.function.name in names[:number]:
                raise ApiError(f"{param}.name: another tool has this name.", param=f"{param}.name")
            try:
                size = len(json.dumps(tool.function.parameters, allow_nan=False))
            except ValueError:
                raise ApiError(f"{param}.parameters: numbers must be finite.", param=f"{param}.parameters") from None
            if size > MAX_SCHEMA:
                message = f"{param}.parameters: a schema may have {MAX_SCHEMA} characters; shorten it."
                raise ApiError(message, param=f"{param}.parameters", code="schema_too_long")
        return [tool_from_openai(tool.model_dump(exclude_none=True)) for tool in tools]


class ChatRequest(GenerationFields, Conversation):
    """Body of `/v1/chat/completions`; the fields of the last group are ignored."""

    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    modalities: list[Literal["text"]] | None = None

    reasoning_effort: str | None = None
    verbosity: str | None = None

    def choice(self) -> tuple[list[ToolSchema], str]:
        """The tools that the model may call, and which it must: auto, none, required or a name. Raises `ApiError`."""
        tools, chosen = self.schemas(), self.tool_choice or "auto"
        if isinstance(chosen, AllowedToolChoice):
            wanted = [self._known(entry.function.name, tools) for entry in chosen.allowed_tools.tools]
            return [tool for tool in tools if tool.name in wanted], chosen.allowed_tools.mode
        if isinstance(chosen, NamedTool):
            return tools, self._known(chosen.function.name, tools)
        if chosen == "required" and not tools:
            raise ApiError("tool_choice: there are no tools to choose from.", param="tool_choice")
        return ([], "none") if chosen == "none" or not tools else (tools, chosen)

    def _known(self, name: str, tools: list[ToolSchema]) -> str:
        if name not in [tool.name for tool in tools]:
            raise ApiError("tool_choice: names a tool that is not among the tools.", param="tool_choice")
        return name

    @property
    def top(self) -> int:
        """How many of the best tokens to name at each step; raises `ApiError` when log probabilities are not wanted."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs: send it with logprobs: true.", param="top_logprobs")
        return self.top_logprobs or 0


class TokenizeRequest(Body):
    """Body of `/tokenize`, vLLM's, for a text. Special tokens that are spelled out in it are recognised."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(Conversation):
    """Body of `/tokenize`, vLLM's, for a conversation as it would be put to the model."""

    add_generation_prompt: Literal[True] = True
    return_token_strs: bool = False


def _kind_to_tokenize(value: Any) -> str:
    return "to_chat" if isinstance(value, dict) and "messages" in value else "to_text"


TOKENIZE = TypeAdapter[TokenizeRequest | TokenizeChatRequest](
    Annotated[
        Annotated[TokenizeRequest, Tag("to_text")] | Annotated[TokenizeChatRequest, Tag("to_chat")],
        Discriminator(_kind_to_tokenize),
    ]
)
"""Reads a body of `/tokenize`."""
