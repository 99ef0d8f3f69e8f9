"""What servers do not know: fields are left out, prompts written here, or it is said in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
from model_servers import (
    READ,
    Answer,
    Start,
    chat,
    chat_body,
    completed,
    error,
    infill,
    said,
)
from starlette.responses import JSONResponse, Response

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import ChatOptions, Completion, Usage
from lsp_agent.errors import Unsupported, UserError


def strict(*unknown: str, message: str = "Unrecognized request argument supplied: {}") -> Answer:
    def answer(path: str, body: dict[str, Any]) -> Response:
        found = next((name for name in unknown if name in body), None)
        return error(message.format(found)) if found else said("hi")

    return answer


def test_fields_that_a_server_names_are_left_out_from_then_on(start: Start) -> None:
    server, model = start(strict("top_k", "min_p", "prediction"), "openai")
    options = ChatOptions(prediction="code")
    assert chat(model, options=options)[0].text == "hi"
    assert len(server.asked) == 4
    assert chat(model, options=options)[0].text == "hi"
    assert len(server.asked) == 5, "it is remembered"
    assert "repetition_penalty" in server.bodies[-1]


def test_where_it_names_none_those_that_only_change_the_speed_go_first(start: Start) -> None:
    server, model = start(strict("prediction", message="Bad request"), "openai")
    chat(model, options=ChatOptions(prediction="code"))
    assert len(server.asked) == 2 and "top_k" in server.bodies[1]
    chat(model, options=ChatOptions(prediction="code"))
    assert len(server.asked) == 3


def test_an_error_that_is_about_something_else_is_told_and_nothing_is_forgotten(start: Start) -> None:
    server, model = start(lambda path, body: error("the template failed"), "openai")
    with pytest.raises(UserError, match=r"refused the request \(HTTP 400\): the template failed"):
        chat(model, options=ChatOptions(prediction="code"))
    server.answer = lambda path, body: said("hi")
    chat(model, options=ChatOptions(prediction="code"))
    assert {"prediction", "top_k"} <= server.bodies[-1].keys()


def test_more_stop_texts_than_the_api_takes_are_heeded_here(start: Start) -> None:
    server, model = start(lambda path, body: said("one two six"), "openai")
    assert chat(model, stop=("q", "z", "k", "j", "v", " six"))[0].text == "one two"
    assert server.bodies[0]["stop"] == ["q", "z", "k", "j"]


def test_newer_models_call_the_limit_otherwise(start: Start) -> None:
    message = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
    server, model = start(strict("max_tokens", message=message), "openai")
    chat(model)
    chat(model)
    assert [("max_tokens" in b, b.get("max_completion_tokens")) for b in server.bodies] == [
        (True, None),
        (False, 8),
        (False, 8),
    ]


def test_vllm_without_a_parser_of_calls_leaves_them_in_the_text(start: Start) -> None:
    def answer(path: str, body: dict[str, Any]) -> Response:
        if "tool_choice" not in body:
            return error('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set')
        return said('<tool_call>\n{"name": "read_file", "arguments": {"path": "a.py"}}\n</tool_call>')

    server, model = start(answer)
    for _ in range(2):
        assert chat(model, tools=[READ])[0].tool_calls[0].arguments == {"path": "a.py"}
    assert [body.get("tool_choice") for body in server.bodies] == [None, "none", "none"]


@pytest.mark.parametrize("refuses", [True, False])
def test_several_answers_are_asked_for_one_by_one_where_need_be(start: Start, refuses: bool) -> None:
    def answer(path: str, body: dict[str, Any]) -> Response:
        if refuses and "n" in body:
            return error("Only one completion choice is allowed")
        return JSONResponse(chat_body([{"content": f"seed {body['seed']}"}]))

    server, model = start(answer, "openai")
    for _ in range(2):
        answers = chat(model, n=3, temperature=0.5, seed=10)
        assert [a.text for a in answers] == ["seed 10", "seed 11", "seed 12"]
        assert [a.usage.prompt_tokens for a in answers] == [7, 7, 7], "each was asked for"
    assert sum("n" in body for body in server.bodies) == 1, "it is remembered"
    before = len(server.asked)
    greedy = chat(model, n=3, seed=1)
    assert [a.text for a in greedy] == ["seed 1"] * 3 and len(server.asked) == before + 1
    assert sum((a.usage for a in greedy), Usage()) == Usage(7, 0, 3), "the same answer is not paid for again"


def test_a_server_that_gives_several_is_asked_once(start: Start) -> None:
    server, model = start(lambda path, body: JSONResponse(chat_body([{"content": str(i)} for i in range(body["n"])])))
    answers = chat(model, n=3)
    assert [a.text for a in answers] == ["0", "1", "2"] and len(server.asked) == 1
    assert [a.usage.prompt_tokens for a in answers] == [7, 0, 0]


def test_vllm_is_sent_the_models_own_prompt(start: Start) -> None:
    server, model = start(lambda path, body: completed("1<|file_sep|>b.py"))
    assert model.file_tokens == ("<|repo_name|>", "<|file_sep|>")
    files = "<|repo_name|>project\n<|file_sep|>test_a.py\nassert a\n<|file_sep|>a.py\n"
    assert infill(model, files + "a = ", "\nb = '<|fim_middle|>'", stop=("\n",)).text == "1"
    ((path, body),) = server.asked
    assert path == "/v1/completions" and "suffix" not in body
    assert body["prompt"] == (f"{files}<|fim_prefix|>a = <|fim_suffix|>\nb = '< |fim_middle|>'<|fim_middle|>"), (
        "a control token in the code is spelled otherwise"
    )
    assert body["stop"][0] == "\n" and "<|file_sep|>" in body["stop"] and body["skip_special_tokens"] is False


@pytest.mark.parametrize(
    ("model_name", "prompt"),
    [
        ("starcoder2-7b", "<fim_prefix>a = <fim_suffix>\n<fim_middle>"),
        ("deepseek-coder-6.7b", "<｜fim▁begin｜>a = <｜fim▁hole｜>\n<｜fim▁end｜>"),
        ("codegemma-7b", "<|fim_prefix|>a = <|fim_suffix|>\n<|fim_middle|>"),
    ],
)
def test_each_family_has_a_prompt_of_its_own(start: Start, model_name: str, prompt: str) -> None:
    server, model = start(lambda path, body: completed("1"), model=model_name)
    infill(model)
    assert server.bodies[0]["prompt"] == prompt


def test_the_family_may_be_set_where_the_name_says_nothing(start: Start) -> None:
    server, model = start(lambda path, body: completed("1"), model="ours", settings={"family": "qwen"})
    infill(model)
    assert server.bodies[0]["prompt"].startswith("<|fim_prefix|>")


def test_servers_that_know_suffix_are_sent_it(start: Start) -> None:
    server, model = start(lambda path, body: completed("1"), "library", "qwen2.5-coder:7b")
    assert infill(model).text == "1" and model.file_tokens is None
    assert (server.bodies[0]["prompt"], server.bodies[0]["suffix"]) == ("a = ", "\n")


def test_llama_cpp_fills_in_by_itself_where_the_family_is_unknown(start: Start) -> None:
    filled = {"content": "1", "stop_type": "limit", "tokens_evaluated": 9, "tokens_predicted": 1}
    server, model = start(lambda path, body: JSONResponse({**filled, "timings": {"cache_n": 4}}), "llamacpp", "m.gguf")
    assert infill(model) == Completion("1", "length", Usage(9, 4, 1))
    ((path, body),) = server.asked
    assert path == "/infill" and (body["input_prefix"], body["input_suffix"]) == ("a = ", "\n")


def test_a_server_that_cannot_fill_in_is_asked_once(start: Start) -> None:
    server, model = start(lambda path, body: error("suffix is not supported"), model="gpt")
    for _ in range(2):
        with pytest.raises(Unsupported, match="set backend"):
            infill(model)
    asked = len(server.asked)
    with pytest.raises(Unsupported):
        infill(model)
    assert len(server.asked) == asked


def test_scores_are_read_and_placed_in_the_text(start: Start) -> None:
    tokens = {
        "tokens": ["a", " =", " '", "\ufffd", "\ufffd", "'", " +"],
        "token_logprobs": [None, -1, -2, -3, -4, -5, -6],
    }
    server, model = start(lambda path, body: JSONResponse({"choices": [{"text": "…", "logprobs": tokens}]}))
    scores = model.score("a = '…'", CancelToken())
    assert [(s.start, s.end, s.logprob) for s in scores] == [(1, 3, -1), (3, 5, -2), (5, 6, -7), (6, 7, -5)]
    assert (server.bodies[0]["echo"], server.bodies[0]["max_tokens"]) == (True, 1)


@pytest.mark.parametrize(
    "answer",
    [
        lambda path, body: error("Only no echo is supported", status=500),
        lambda path, body: JSONResponse({"choices": [{"logprobs": {"tokens": [None], "token_logprobs": [-1]}}]}),
        lambda path, body: JSONResponse({"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": ["?"]}}]}),
        lambda path, body: completed("and so on"),
        lambda path, body: JSONResponse(
            {"choices": [{"text": "on", "logprobs": {"tokens": [" on"], "token_logprobs": [-1.0]}}]}
        ),
    ],
)
def test_a_server_without_scores_is_asked_once(start: Start, answer: Answer) -> None:
    server, model = start(answer)
    for _ in range(2):
        with pytest.raises(Unsupported, match="does not tell how likely"):
            model.score("a = 1", CancelToken())
    assert len(server.asked) == 1
