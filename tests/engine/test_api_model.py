"""What the official client gets from the real 0.5B model: calls, forms, gaps, predictions, no turn read twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from difflib import SequenceMatcher
from typing import Any, Literal

import openai
import pydantic
import pytest
from api_service import serving

from lsp_agent.engine.engine import Engine
from lsp_agent.errors import UserError
from lsp_agent.models import store

pytestmark = pytest.mark.model

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tell a city's weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
        },
    },
}
CODE = '''def area(width: float, height: float) -> float:
    """Give the area of a rectangle."""
    return width * height


def perimeter(width: float, height: float) -> float:
    """Give the perimeter of a rectangle."""
    return 2 * (width + height)
'''


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    try:
        installed = store.resolve("qwen2.5-coder-0.5b")
    except UserError as error:
        pytest.skip(str(error))
    engine = Engine.load(installed.path, threads=1, context=2048)
    with serving({"coder": engine}) as service, service.openai() as made:
        yield made


def chat(client: openai.OpenAI, content: str, **options: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        **{"model": "coder", "messages": messages, "temperature": 0, "max_tokens": 48, **options}
    )


def test_a_gap_is_filled(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="coder",
        prompt="def area(width, height):\n    ",
        suffix="\n\n\nprint(area(2, 3))\n",
        temperature=0,
        stop="\n",
    )
    assert answer.choices[0].text == "return width * height"


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_is_called(client: openai.OpenAI, choice: Any) -> None:
    answer = chat(client, "What is the weather in Paris, in celsius?", tools=[WEATHER], tool_choice=choice)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris", "unit": "celsius"}


def test_a_call_is_streamed_and_its_result_answered_without_reading_anything_twice(client: openai.OpenAI) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
    options: dict[str, Any] = {"model": "coder", "tools": [WEATHER], "temperature": 0, "max_tokens": 64}
    with client.chat.completions.stream(
        messages=messages, tool_choice="required", stream_options={"include_usage": True}, **options
    ) as stream:
        first = stream.get_final_completion()
    said = first.choices[0].message
    assert said.tool_calls and first.usage
    messages += [
        {"role": "assistant", "content": said.content, "tool_calls": [call.model_dump() for call in said.tool_calls]},
        {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": '{"sky": "clear", "degrees": 21}'},
    ]
    second = client.chat.completions.create(messages=messages, **options)
    read_before = first.usage.prompt_tokens + first.usage.completion_tokens - 1  # the last token was drawn, not read
    assert second.usage.prompt_tokens_details.cached_tokens >= read_before - 1


def test_json_fits_its_model(client: openai.OpenAI) -> None:
    class Person(pydantic.BaseModel):
        name: str
        age: int
        role: Literal["engineer", "teacher"]

    answer = client.chat.completions.parse(
        model="coder",
        messages=[{"role": "user", "content": "Extract: Alice, 30, works as a teacher."}],
        response_format=Person,
        temperature=0,
        max_tokens=64,
    )
    assert answer.choices[0].message.parsed == Person(name="Alice", age=30, role="teacher")
    anything = chat(client, "Give a JSON object with the key a.", response_format={"type": "json_object"})
    assert isinstance(json.loads(anything.choices[0].message.content), dict)


def test_with_tools_a_form_is_that_of_the_answer_that_does_not_call(client: openai.OpenAI) -> None:
    class Reply(pydantic.BaseModel):
        reply: str

    form = {"type": "json_schema", "json_schema": {"name": "reply", "schema": Reply.model_json_schema()}}
    for question in ("What is the weather in Paris, in celsius?", "Say hello."):
        message = chat(client, question, tools=[WEATHER], response_format=form).choices[0].message
        assert message.tool_calls or Reply.model_validate_json(message.content)


def test_a_prediction_is_copied_and_counted(client: openai.OpenAI) -> None:
    ask = f"Rename width to w. Answer with the whole file and nothing else.\n\n```python\n{CODE}```"
    plain = chat(client, ask, max_tokens=120)
    guessed = chat(client, ask, max_tokens=120, prediction={"type": "content", "content": CODE})
    alike = SequenceMatcher(None, guessed.choices[0].message.content, plain.choices[0].message.content, autojunk=False)
    assert alike.ratio() > 0.8  # runs of several tokens round differently, which decides near ties
    details = guessed.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 20
    assert details.rejected_prediction_tokens < details.accepted_prediction_tokens


def test_answers_that_are_asked_for_at_once_are_those_that_are_asked_for_alone(client: openai.OpenAI) -> None:
    questions = [f"What is {number} plus {number}? Answer with the number alone." for number in range(2, 8)]
    alone = [chat(client, question, max_tokens=6).choices[0].message.content for question in questions]
    with ThreadPoolExecutor(6) as pool:
        together = list(
            pool.map(lambda question: chat(client, question, max_tokens=6).choices[0].message.content, questions)
        )
    assert sum(a == b for a, b in zip(alone, together, strict=True)) >= 5  # rounding differs between batches
