"""What of a body reaches the engine, and what of the engine's figures reaches the answer."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from api_service import END, Speaker, ask
from tool_calls_samples import TOOLS, write_qwen3_coder

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import AnswerFormat, Sampling
from lsp_agent.engine.api.chat_requests import ChatRequest
from lsp_agent.engine.api.errors import ApiError
from lsp_agent.engine.api.prepare import LONGEST_TOKEN, STEADY, Asker, Prepared, prepare_chat, prepare_text
from lsp_agent.engine.api.requests import MAX_SCHEMA, CompletionRequest
from lsp_agent.engine.request import INTERACTIVE, Request, Timings
from lsp_agent.engine.service.catalog import ServedModel
from lsp_agent.engine.tool_calls import tool_to_openai
from lsp_agent.errors import PromptTooLong

HI = [{"role": "user", "content": "hi"}]
TOOL_ENTRIES = [tool_to_openai(tool) for tool in TOOLS]
READ = write_qwen3_coder("read_file", {"path": "a.py"})
ASKER = Asker("me", CancelToken())
MAKERS = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
MODEL = ServedModel("speaker", 4096, 0, True)


def text_prepared(engine: Any = None, **body: Any) -> Prepared:
    engine = engine or Speaker()
    return prepare_text(engine, replace(MODEL, sampling=MAKERS), CompletionRequest(**{"prompt": "ab", **body}), ASKER)


def text_request(**body: Any) -> Request:
    (request,) = text_prepared(**body).requests
    return request


def chat_prepared(engine: Any, **body: Any) -> Prepared:
    return prepare_chat(engine, MODEL, ChatRequest.model_validate_json(json.dumps({"messages": HI, **body})), ASKER)


def test_what_the_makers_recommend_stands_where_nothing_is_asked() -> None:
    assert text_request().sampling == Sampling(16, 0.7, 20, 0.8)
    asked = text_request(temperature=0.2, top_p=1, top_k=-1, min_p=0.1, repetition_penalty=1.1).sampling
    assert asked == Sampling(16, 0.2, 0, 1, 0.1, 1.1)
    assert prepare_text(Speaker(), MODEL, CompletionRequest(prompt="ab"), ASKER).requests[0].sampling.temperature == 1


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    assert text_request(temperature=1e-300).sampling.temperature == 0


def test_a_null_is_as_good_as_nothing() -> None:
    fields = ("temperature", "top_p", "stop", "seed", "max_tokens", "logit_bias", "suffix", "user", "stream_options")
    assert text_request(**dict.fromkeys(fields)) == text_request()


def test_every_field_reaches_the_engine() -> None:
    request = text_request(
        n=3,
        max_tokens=99,
        seed=-5,
        stop=["x", "yz"],
        stop_token_ids=[8, 9],
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={7: -1.5},
        prediction={"type": "content", "content": [{"type": "text", "text": "AB"}, {"type": "text", "text": "C"}]},
        priority=INTERACTIVE,
        logprobs=4,
    )
    sampling = request.sampling
    assert (request.n, request.top, request.priority, request.client) == (3, 4, INTERACTIVE, "me")
    assert request.cancel is ASKER.cancel
    assert (sampling.max_tokens, sampling.seed, sampling.stop) == (99, -5, ("x", "yz"))
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.5, -0.5)
    assert sampling.logit_bias == ((7, -1.5),)
    assert request.stop_ids == {END, 8, 9} and list(request.prediction) == [65, 66, 67]


def test_ignored_ends() -> None:
    assert text_request(ignore_eos=True, stop_token_ids=[5]).stop_ids == {5}


def test_a_chat_may_fill_the_context_and_its_turns_are_where_later_prompts_branch() -> None:
    (request,) = chat_prepared(Speaker()).requests
    assert request.sampling.max_tokens == Speaker.context_length and list(request.boundaries) == [2]


def test_a_gap_is_branched_off_a_little_before_the_cursor() -> None:
    class Filling(Speaker):
        def infill_prompt(self, prefix: str, suffix: str) -> list[int]:
            return [1, *map(ord, prefix), 2, *map(ord, suffix), 3]

    (request,) = text_prepared(Filling(), prompt="x" * 100, suffix="y").requests
    assert list(request.prompt[-4:]) == [ord("x"), 2, ord("y"), 3]
    assert list(request.boundaries) == [101 - STEADY]
    assert list(text_prepared(Filling(), prompt="x", suffix="y").requests[0].boundaries) == []
    assert list(text_prepared(prompt="x" * 100).requests[0].boundaries) == [100 - STEADY]


def test_a_text_that_cannot_fit_is_not_even_tokenised() -> None:
    class Unread(Speaker):
        def chat_prompt(self, messages: Any, tools: Any) -> Any:
            raise AssertionError

        infill_prompt = chat_prompt

    text = "x" * (LONGEST_TOKEN * Speaker.context_length + 1)
    speaker = Unread()
    speaker.tokenizer.encode = None  # type: ignore[method-assign]
    with pytest.raises(PromptTooLong):
        chat_prepared(speaker, messages=[{"role": "user", "content": text}])
    for body in ({"prompt": text}, {"prompt": "a", "suffix": text}):
        with pytest.raises(PromptTooLong):
            text_prepared(speaker, **body)


def test_a_model_that_fills_no_gaps_says_so() -> None:
    with pytest.raises(ApiError, match="fill in the middle"):
        prepare_text(Speaker(), replace(MODEL, infills=False), CompletionRequest(prompt="a", suffix="b"), ASKER)


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({"response_format": {"type": "text"}}, AnswerFormat()),
        ({"response_format": {"type": "json_object"}}, AnswerFormat("json")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}}},
            AnswerFormat("json_schema", '{"type": "null"}'),
        ),
        ({"structured_outputs": {"json": {"type": "null"}}}, AnswerFormat("json_schema", '{"type": "null"}')),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, AnswerFormat("json_schema", '{"type": "null"}')),
        ({"structured_outputs": {"json_object": True}}, AnswerFormat("json")),
        ({"structured_outputs": {"regex": "a+"}}, AnswerFormat("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", '"']}}, AnswerFormat("lark", r'start: "a" | "\""')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, AnswerFormat("lark", 'start: "a"')),
        ({"structured_outputs": {"python_function": "def f():"}}, AnswerFormat("python_function", "def f():")),
    ],
    ids=lambda value: value.kind if isinstance(value, AnswerFormat) else next(iter(value)),
)
def test_the_forms_of_an_answer(asked: dict[str, Any], form: AnswerFormat) -> None:
    assert ChatRequest.model_validate({"messages": HI, **asked}).answer_format() == form
    assert CompletionRequest.model_validate({"prompt": "x", **asked}).answer_format() == form


@pytest.mark.parametrize("kind", ["json", "regex", "grammar", "python_function"])
def test_a_form_that_is_too_long_is_refused(kind: str) -> None:
    body = CompletionRequest.model_validate({"prompt": "x", "structured_outputs": {kind: "x" * (MAX_SCHEMA + 1)}})
    with pytest.raises(ApiError, match="characters"):
        body.answer_format()


def test_a_number_in_a_schema_must_be_one() -> None:
    body = ChatRequest.model_validate_json(
        b'{"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"json": {"minimum": 1e999}}}'
    )
    with pytest.raises(ApiError, match="finite"):
        body.answer_format()


def test_an_answer_of_a_form_must_be_able_to_end(tiny_engine: Any) -> None:
    with pytest.raises(ApiError, match="ignore_eos"):
        text_prepared(tiny_engine(), ignore_eos=True, structured_outputs={"regex": "a"})


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, (["read_file", "run_tests"], "auto")),
        ({"tool_choice": "auto"}, (["read_file", "run_tests"], "auto")),
        ({"tool_choice": "none"}, ([], "none")),
        ({"tool_choice": "required"}, (["read_file", "run_tests"], "required")),
        (
            {"tool_choice": {"type": "function", "function": {"name": "run_tests"}}},
            (["read_file", "run_tests"], "run_tests"),
        ),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "required",
                        "tools": [{"type": "function", "function": {"name": "run_tests"}}],
                    },
                }
            },
            (["run_tests"], "required"),
        ),
    ],
    ids=str,
)
def test_the_choice_of_tools(chosen: dict[str, Any], expected: tuple[list[str], str]) -> None:
    entries = [entry for entry in TOOL_ENTRIES if entry["function"]["name"] in ("read_file", "run_tests")]
    tools, choice = ChatRequest.model_validate({"messages": HI, "tools": entries, **chosen}).choice()
    assert ([tool.name for tool in tools], choice) == expected


def test_without_tools_there_is_no_choice() -> None:
    assert ChatRequest.model_validate({"messages": HI, "tool_choice": "auto"}).choice() == ([], "none")


def test_a_call_that_is_required_is_constrained() -> None:
    """The tiny models know no tools; what the masks allow is tested with the constraints."""
    speaker = Speaker([READ])
    required = {"tools": TOOL_ENTRIES, "tool_choice": "required"}
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Any] = []
        patch.setattr("lsp_agent.engine.api.prepare.constraint_for_tools", lambda *given: seen.append(given) or "made")
        (request,) = chat_prepared(speaker, **required, parallel_tool_calls=False).requests
    ((tools, choice, call_format, tokenizer, parallel, form),) = seen
    assert form == AnswerFormat()
    assert request.constraint == "made" and [tool.name for tool in tools] == [tool.name for tool in TOOLS]
    assert (choice, call_format, tokenizer, parallel) == ("required", "qwen3_coder", speaker.tokenizer, False)


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time_ends_the_answer_with_the_first(stream: bool) -> None:
    speaker = Speaker([f"I look.\n{READ}\n{READ}", "Nothing to do."])
    response = ask(speaker, messages=HI, tools=TOOL_ENTRIES, parallel_tool_calls=False, n=2, stream=stream)
    assert speaker.finished == [0]
    if stream:
        assert response.text.count("tool_calls") == 2  # the call, and why the answer ended
        assert "Nothing to do".replace(" ", "") in "".join(
            choice["delta"].get("content", "")
            for block in response.text.split("\n\n")[:-2]
            for choice in json.loads(block.removeprefix("data: "))["choices"]
            if choice["index"] == 1
        ).replace(" ", "")
    else:
        called, other = response.json()["choices"]
        assert called["finish_reason"] == "tool_calls" and called["message"]["content"] == "I look.\n"
        assert len(called["message"]["tool_calls"]) == 1
        assert other["message"]["content"] == "Nothing to do."


def test_an_answer_is_remembered_with_its_tokens_before_it_is_given_out() -> None:
    speaker = Speaker([f"I look.\n{READ}"])
    ask(speaker, messages=HI, tools=TOOL_ENTRIES)
    ((prompt, answer, tokens),) = speaker.tokenizer.remembered
    assert prompt == [11, 12, 13] and [call.name for call in answer.tool_calls] == ["read_file"]
    assert "".join(map(chr, tokens[:-1])) == f"I look.\n{READ}" and tokens[-1] == END
    ask(speaker, "/v1/completions", prompt="ab", max_tokens=400)
    assert len(speaker.tokenizer.remembered) == 1


def test_what_was_cached_and_guessed_is_told() -> None:
    timings = Timings(prompt_tokens=9, cached_tokens=4, drafted_tokens=7, accepted_tokens=5)
    usage = ask(Speaker(["abc"], timings=timings), messages=HI).json()["usage"]
    assert usage == {
        "prompt_tokens": 9,
        "completion_tokens": 4,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"accepted_prediction_tokens": 5, "rejected_prediction_tokens": 2},
    }


@pytest.mark.parametrize("text", ["", "x = 'ü€🙂'"])
def test_an_echo_without_scores_is_text_alone(text: str) -> None:
    prompt = text or "ab"
    body = ask(Speaker(["cd"]), "/v1/completions", prompt=prompt, echo=True).json()
    (choice,) = body["choices"]
    assert choice["text"] == f"{prompt}cd" and choice["logprobs"] is None


def test_nothing_is_generated_where_nothing_was_asked_for() -> None:
    speaker = Speaker(["cd"])
    (choice,) = ask(speaker, "/v1/completions", prompt="ab", max_tokens=0).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length") and not speaker.asked


def test_what_an_assistant_refused_to_say_is_text() -> None:
    said = {
        "role": "assistant",
        "content": [{"type": "refusal", "refusal": "No."}, {"type": "text", "text": " Sorry."}],
    }
    asked = ChatRequest.model_validate({"messages": [*HI, said, {"role": "assistant", "content": None}]})
    assert [message["content"] for message in asked.conversation()] == ["hi", "No. Sorry.", ""]
