"""Bodies that no client would send: each is answered or refused in the API's shape, none is a fault of ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_service import serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lsp_agent.engine.api.chat_requests import ChatRequest
from lsp_agent.engine.api.requests import CompletionRequest

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
FORMS = st.sampled_from(["json", "regex", "choice", "grammar", "python_function", "json_object"])
MEANT = {
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]), "content": JSON},
            optional={"tool_calls": JSON, "tool_call_id": JSON},
        ),
        max_size=3,
    ),
    "tools": st.lists(st.just(TOOL) | JSON, max_size=2),
    "tool_choice": st.sampled_from(["none", "auto", "required", {"type": "function", "function": {"name": "f"}}]),
    "structured_outputs": st.dictionaries(FORMS, JSON, max_size=2),
    "response_format": st.fixed_dictionaries({"type": st.just("json_schema"), "json_schema": JSON}),
    "prompt": st.text(max_size=9) | st.lists(st.integers(-1, 400), max_size=4) | st.lists(st.text(max_size=5)),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "logit_bias": st.dictionaries(st.integers(-1, 400).map(str), st.integers(-110, 110), max_size=3),
    "temperature": st.floats(-1, 3),
    "top_p": st.floats(-0.1, 1.1),
    "stream": st.booleans(),
    "n": st.integers(-1, 4),
    "echo": st.booleans(),
    "logprobs": st.booleans() | st.integers(-1, 22),
    "suffix": st.text(max_size=5),
}
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields} - {"max_tokens", "max_completion_tokens"})


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    body: dict[str, Any] = {"max_tokens": 2}
    body |= {"messages": [{"role": "user", "content": "hi"}]} if draw(st.booleans()) else {"prompt": "ab"}
    for field in draw(st.lists(st.sampled_from(FIELDS), max_size=3)):
        body[field] = draw(MEANT.get(field, JSON) | JSON)
    return body


@pytest.fixture(scope="module")
def http(tiny_engine: Any) -> Iterator[httpx.Client]:
    with serving({"tiny": tiny_engine()}) as service, service.http() as client:
        yield client


@given(body=bodies())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_body_is_answered_or_refused(http: httpx.Client, body: dict[str, Any]) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    try:
        response = http.post(path, json=body)
    except (ValueError, UnicodeEncodeError):  # not JSON: infinities, half of a surrogate pair
        return
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    elif body.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n") and "internal_error" not in response.text
    else:
        assert response.json()["choices"]
