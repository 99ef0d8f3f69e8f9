"""The official client against a real server over a unix socket, with small random models."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import openai
import pydantic
import pytest
from api_service import Service, serving

from lsp_agent.chat_model import Sampling
from lsp_agent.engine.api.prepare import STEADY
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.request import Request

HI = [{"role": "user", "content": "hello"}]
PROMPT = "def add(a, b):"


@pytest.fixture(scope="module", params=["attention", "hybrid"])
def engine(request: pytest.FixtureRequest, tiny_engine: Any, hf_engine: Any) -> Engine:
    return tiny_engine() if request.param == "attention" else hf_engine("qwen3-next")


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[Service]:
    with serving({"tiny": engine}) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[openai.OpenAI]:
    with service.openai() as made:
        yield made


def complete(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(
        **{"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **options}
    )


def said(service: Service, engine: Engine, count: int) -> list[int]:
    """The tokens behind an answer."""
    told: SimpleQueue[Any] = SimpleQueue()
    asked = Request(engine.tokenizer.encode(PROMPT), Sampling(max_tokens=count), stop_ids=engine.stop_ids)
    service.host.submit(engine, asked, told.put)
    return [step.token for step in iter(lambda: told.get(timeout=10), None)]


def test_models(client: openai.OpenAI, engine: Engine) -> None:
    (listed,) = client.models.list().data
    assert listed.id == "tiny" and listed.object == "model" and listed.owned_by == "lsp-agent"
    assert listed.model_dump()["max_model_len"] == engine.context_length
    assert client.models.retrieve("tiny") == listed
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


def test_a_completion_counts_its_tokens(client: openai.OpenAI, engine: Engine) -> None:
    answer = complete(client)
    ids = engine.tokenizer.encode(PROMPT)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "tiny"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 8)


def test_what_was_read_is_not_read_again(client: openai.OpenAI, engine: Engine) -> None:
    """Of a hybrid model, up to the place where a text that goes on would be branched off."""
    prompt = "import sys, os\n\n\n" + PROMPT
    ids = engine.tokenizer.encode(prompt)
    complete(client, prompt=prompt)
    cached = complete(client, prompt=prompt).usage.prompt_tokens_details.cached_tokens
    assert cached == (len(ids) - STEADY if engine.config.linear_attention else len(ids) - 1) > 0


def test_a_stream_of_a_completion_adds_up(client: openai.OpenAI) -> None:
    whole = complete(client, n=2, seed=5, temperature=1, logprobs=1)
    texts, tokens, reasons = ["", ""], [[], []], [None, None]
    *chunks, last = complete(
        client, n=2, seed=5, temperature=1, logprobs=1, stream=True, stream_options={"include_usage": True}
    )
    for chunk in chunks:
        (choice,) = chunk.choices
        assert chunk.usage is None
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices] and texts[0] != texts[1]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens


def test_the_seed_and_the_penalties_reach_the_sampler(client: openai.OpenAI, engine: Engine) -> None:
    def drawn(**options: Any) -> str:
        return complete(client, temperature=1, max_tokens=12, **options).choices[0].text

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)

    def first(**options: Any) -> list[int]:
        answer = client.chat.completions.create(
            model="tiny", messages=HI, temperature=0, max_tokens=1, logprobs=True, **options
        )
        return answer.choices[0].logprobs.content[0].bytes

    said = first()
    token = next(t for t in range(engine.config.vocabulary) if list(engine.tokenizer.spelled(t)) == said)
    assert first(logit_bias={str(token): -100}) != said
    (letter,) = engine.tokenizer.encode("a")
    forced = complete(client, logit_bias={str(letter): 100}, logprobs=0)
    assert set(forced.choices[0].logprobs.tokens) == {"a"}
    spread = complete(client, logit_bias={str(letter): 4}, presence_penalty=2, frequency_penalty=2, logprobs=0)
    assert len(set(spread.choices[0].logprobs.tokens)) > 1


def test_a_stop_string_ends_the_answer_before_it_and_its_tokens(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=24, logprobs=0).choices[0]
    place = whole.logprobs.text_offset[6]
    stop = whole.text[place : place + 3]
    for stops in (stop, [stop, "never said"]):
        cut = complete(client, max_tokens=24, stop=stops, logprobs=0).choices[0]
        assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.find(stop)]
        assert 0 < len(cut.logprobs.tokens) <= 6
        assert cut.logprobs.tokens == whole.logprobs.tokens[: len(cut.logprobs.tokens)]


def test_logprobs_of_a_completion(client: openai.OpenAI, engine: Engine) -> None:
    logprobs = complete(client, logprobs=3).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 8
    for value, best in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert value == pytest.approx(max(best.values()))  # at temperature 0
        assert list(best.values()) == sorted(best.values(), reverse=True)
    assert logprobs.text_offset[0] == 0 and logprobs.text_offset == sorted(logprobs.text_offset)


def test_a_text_is_scored(client: openai.OpenAI, engine: Engine) -> None:
    text = "def naïve(a):\n    return 'ü€'"
    scored = complete(client, prompt=text, echo=True, max_tokens=0, logprobs=2)
    (choice,) = scored.choices
    ids = engine.tokenizer.encode(text)
    assert choice.text == text and choice.finish_reason == "length"
    assert (scored.usage.prompt_tokens, scored.usage.completion_tokens) == (len(ids), 0)
    first, *values = choice.logprobs.token_logprobs
    assert first is None and choice.logprobs.top_logprobs[0] is None and len(values) == len(ids) - 1
    again = complete(client, prompt=ids, echo=True, max_tokens=0, logprobs=0)
    assert again.choices[0].text == text and again.choices[0].logprobs.token_logprobs[1:] == pytest.approx(values)
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        assert "\ufffd" in token or text[offset:].startswith(token)


def test_the_scores_of_what_was_said_are_its_logprobs(service: Service, client: openai.OpenAI, engine: Engine) -> None:
    echoed = complete(client, echo=True, logprobs=0).choices[0]
    ids = engine.tokenizer.encode(PROMPT) + said(service, engine, 8)
    scored = complete(client, prompt=ids, echo=True, logprobs=0, max_tokens=0).choices[0]
    assert scored.text == echoed.text and scored.logprobs.tokens == echoed.logprobs.tokens
    assert scored.logprobs.text_offset == echoed.logprobs.text_offset
    assert scored.logprobs.token_logprobs[1:] == pytest.approx(echoed.logprobs.token_logprobs[1:], abs=1e-3)


def test_several_prompts_as_text_or_tokens(client: openai.OpenAI, engine: Engine) -> None:
    other = "class A:"
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in (PROMPT, other)]
    for prompts in ([PROMPT, other], [engine.tokenizer.encode(PROMPT), engine.tokenizer.encode(other)]):
        both = complete(client, prompt=prompts, n=2)
        assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in both.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert both.usage.prompt_tokens == sum(len(engine.tokenizer.encode(prompt)) for prompt in (PROMPT, other))


def test_a_chat_and_its_logprobs(client: openai.OpenAI) -> None:
    options = {"model": "tiny", "messages": HI, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    answer = client.chat.completions.create(**options, temperature=0)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.tool_calls is None
    said = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert said.decode(errors="replace") == choice.message.content
    for token in choice.logprobs.content:
        assert token.token == bytes(token.bytes).decode(errors="replace")
        assert len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert math.exp(token.logprob) <= 1
    streamed = [
        token
        for chunk in client.chat.completions.create(**options, temperature=0, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.token for token in streamed] == [token.token for token in choice.logprobs.content]


def test_the_newer_name_of_the_limit_counts(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HI, max_completion_tokens=3, max_tokens=9)
    assert answer.usage.completion_tokens <= 3


def test_a_developers_message_and_parts_are_read(client: openai.OpenAI) -> None:
    def asked(*messages: dict[str, Any]) -> int:
        answer = client.chat.completions.create(model="tiny", messages=[*messages], max_tokens=1, temperature=0)
        return answer.usage.prompt_tokens

    system = asked({"role": "system", "content": "Be short."}, *HI)
    assert asked({"role": "developer", "content": [{"type": "text", "text": "Be short."}]}, *HI) == system


def test_ignored_fields_are_taken(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="tiny",
        messages=HI,
        max_tokens=1,
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        user="me",
        safety_identifier="me",
        prompt_cache_key="x",
        reasoning_effort="low",
        verbosity="low",
        modalities=["text"],
    )


def test_json_that_fits_its_model(client: openai.OpenAI) -> None:
    class Flag(pydantic.BaseModel):
        on: bool

    parsed = client.chat.completions.parse(
        model="tiny", messages=HI, response_format=Flag, max_tokens=40, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Flag)


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        ({"choice": ["yes", 'no "way"']}, {"yes", 'no "way"'}),
        ({"regex": "[ab]{3}"}, {a + b + c for a in "ab" for b in "ab" for c in "ab"}),
        ({"json": {"enum": [1, 2]}}, {"1", "2"}),
        ({"grammar": 'start: "x" | "yy"'}, {"x", "yy"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("chat", [True, False])
def test_structured_outputs(client: openai.OpenAI, chat: bool, asked: dict[str, Any], allowed: set[str]) -> None:
    options: dict[str, Any] = {"model": "tiny", "extra_body": {"structured_outputs": asked}, "max_tokens": 40}
    if chat:
        said = client.chat.completions.create(messages=HI, **options).choices[0].message.content
    else:
        said = client.completions.create(prompt=PROMPT, **options).choices[0].text
    assert said in allowed


@pytest.mark.parametrize("schema", [{"type": "elephant"}, {"$ref": "#/nowhere"}])
def test_a_schema_that_is_none_is_a_bad_request(client: openai.OpenAI, schema: dict[str, Any]) -> None:
    shaped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=HI, response_format=shaped)


def test_a_prompt_that_does_not_fit(client: openai.OpenAI, engine: Engine) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, prompt="word " * engine.context_length)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, prompt="word " * engine.context_length, echo=True, logprobs=0, max_tokens=0)
    assert raised.value.code == "context_length_exceeded"


def test_tokens_there_and_back(service: Service, engine: Engine) -> None:
    text = "def naïve(a):\n    return 'ü€'"
    with service.http() as http:
        told = http.post("/tokenize", json={"model": "tiny", "prompt": text, "return_token_strs": True}).json()
        assert told["tokens"] == engine.tokenizer.encode(text) and told["count"] == len(told["tokens"])
        assert told["max_model_len"] == engine.context_length and len(told["token_strs"]) == told["count"]
        assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text}
        chat = http.post("/tokenize", json={"messages": HI}).json()
        assert chat["tokens"] == list(engine.chat_prompt(HI).ids)
        assert http.post("/tokenize", json={}).status_code == 400
        assert http.post("/detokenize", json={"tokens": [10**8]}).status_code == 400


def test_metrics(service: Service, client: openai.OpenAI) -> None:
    def read() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}

    with service.http() as http:
        before = read()
        usage = complete(client, prompt="while True:\n    print('metrics')", max_tokens=5).usage
        http.get("/made/up")
        after = read()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown['lsp_agent_requests_total{route="/v1/completions",status="200"}'] == 1
    assert grown['lsp_agent_requests_total{route="other",status="404"}'] == 1
    assert grown["lsp_agent_prompt_tokens_total"] == usage.prompt_tokens
    assert grown["lsp_agent_cached_tokens_total"] == usage.prompt_tokens_details.cached_tokens
    assert grown["lsp_agent_generated_tokens_total"] == usage.completion_tokens == 5
    assert grown["lsp_agent_time_to_first_token_seconds_count"] == 1
    assert grown["lsp_agent_time_per_token_seconds_count"] == 1
    assert after['lsp_agent_model_queue_running{model="tiny"}'] == 0
    assert after["process_resident_memory_bytes"] > 1e6
    assert any(name.startswith("lsp_agent_model_cache") for name in after)
    assert json.dumps(after).count("secret") == 0
