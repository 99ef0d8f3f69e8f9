"""One client for many servers: what it asks of each, and how it reads what each answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from model_servers import Answer, ModelServer, chat_body, completed, delta, error, refused, said, streamed
from starlette.responses import JSONResponse, Response, StreamingResponse

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import AnswerFormat, ChatOptions, Completion, Message, Sampling, ToolSchema, Usage
from lsp_agent.config import Backend
from lsp_agent.engine.service import backend as backends
from lsp_agent.engine.service.openai_model import OpenAiModel
from lsp_agent.errors import Cancelled, PromptTooLong, UnknownModel, Unsupported, UserError

Start = Callable[..., tuple[ModelServer, OpenAiModel]]
HELLO: list[Message] = [{"role": "user", "content": "hello"}]
READ = ToolSchema(
    "read_file",
    "Read a file.",
    {"type": "object", "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}}, "required": ["path"]},
)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backends.KEY_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_from_keyring", lambda url: "")


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    with ModelServer().running() as running:
        yield running


@pytest.fixture
def start(server: ModelServer) -> Iterator[Start]:
    """`start(answer, owner, model, settings={}, **entry)`: the server as it is now, and a model opened on it."""
    with ExitStack() as stack:

        def run(
            answer: Answer, owner: str = "vllm", model: str = "qwen2.5-coder-7b", settings: Any = None, **entry: Any
        ) -> tuple[ModelServer, OpenAiModel]:
            server.serve(answer, owner, model, **entry)
            opened = backends.open_backend(Backend(url=server.url, **(settings or {})))
            stack.callback(opened.close)
            return server, opened

        yield run


def chat(model: OpenAiModel, n: int = 1, tools: Any = (), options: ChatOptions | None = None, **s: Any) -> Any:
    return model.chat(HELLO, Sampling(**{"max_tokens": 8, **s}), CancelToken(), n, tools, options or ChatOptions())


def infill(model: OpenAiModel, prefix: str = "a = ", suffix: str = "\n", **s: Any) -> Completion:
    return model.infill(prefix, suffix, Sampling(**{"max_tokens": 8, **s}), CancelToken())[0]


# what is asked -------------------------------------------------------------------------------------------------------


def test_sampling_is_spelled_out_because_servers_have_defaults_of_their_own(start: Start) -> None:
    server, model = start(lambda path, body: said("hi"))
    chat(model, stop=("x",), seed=5)
    assert server.asked == [
        (
            "/v1/chat/completions",
            {
                "model": "qwen2.5-coder-7b",
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 8,
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "seed": 5,
                "stop": ["x"],
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
    ]


def test_llama_cpp_has_another_name_for_the_repetition_penalty(start: Start) -> None:
    server, model = start(lambda path, body: said("hi"), "llamacpp")
    chat(model, repetition_penalty=1.1)
    assert server.bodies[0]["repeat_penalty"] == 1.1 and "repetition_penalty" not in server.bodies[0]


@pytest.mark.parametrize(
    ("owner", "wanted", "sent"),
    [
        ("vllm", AnswerFormat("json"), {"response_format": {"type": "json_object"}}),
        ("vllm", AnswerFormat("regex", "a+"), {"structured_outputs": {"regex": "a+"}}),
        ("vllm", AnswerFormat("lark", "start: /a/"), {"structured_outputs": {"grammar": "start: /a/"}}),
        (
            "llamacpp",
            AnswerFormat("json_schema", '{"type": "object"}'),
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
                }
            },
        ),
        ("llamacpp", AnswerFormat("regex", "a+"), "a regex"),
        ("vllm", AnswerFormat("python_function", "def f():"), "a python function"),
    ],
)
def test_a_form_of_the_answer_is_asked_for_or_refused(start: Start, owner: str, wanted: Any, sent: Any) -> None:
    server, model = start(lambda path, body: said("{}"), owner)
    if isinstance(sent, str):
        with pytest.raises(Unsupported, match=sent):
            chat(model, options=ChatOptions(answer_format=wanted))
        assert server.asked == []
    else:
        chat(model, options=ChatOptions(answer_format=wanted))
        assert sent.items() <= server.bodies[0].items()


def test_what_other_servers_do_not_know_is_left_out_of_a_conversation(start: Start) -> None:
    server, model = start(lambda path, body: said("hi"))
    called = model.chat(HELLO, Sampling(), CancelToken())  # warm
    assert called
    from lsp_agent.chat_model import ToolCall

    call = ToolCall("c1", "read_file", {"path": "a.py"}, raw="<tool_call>…")
    history: list[Message] = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "text", "tool_call_id": "c1"},
    ]
    model.chat(history, Sampling(), CancelToken())
    assert server.bodies[1]["messages"][1]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "a.py"}'}}
    ]


def test_tools_and_the_choice_among_them(start: Start) -> None:
    server, model = start(lambda path, body: said("x"))
    other = ToolSchema("other")
    chat(model, tools=[READ, other], options=ChatOptions(tool_choice="read_file"))
    chat(model, tools=[READ, other], options=ChatOptions(tool_choice="none"))
    named, none = server.bodies
    assert named["tool_choice"] == {"type": "function", "function": {"name": "read_file"}}
    assert [tool["function"]["name"] for tool in named["tools"]] == ["read_file", "other"]
    assert "tools" not in none
    server, model = start(lambda path, body: said("x"), "llamacpp")  # which knows no choice by name
    chat(model, tools=[READ, other], options=ChatOptions(tool_choice="read_file"))
    (body,) = server.bodies
    assert body["tool_choice"] == "required" and [t["function"]["name"] for t in body["tools"]] == ["read_file"]


# what is answered ----------------------------------------------------------------------------------------------------


def test_a_stream_is_put_together(start: Start) -> None:
    counted = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}
    answer = streamed(
        delta(role="assistant", content=""),
        delta(content="one\u2028"),  # a line break to `str.splitlines`, but not to JSON
        delta(content="two\x85", reasoning_content="thinking"),
        delta(finish="length"),
        {"choices": [], "usage": counted},
    )
    _, model = start(lambda path, body: answer)
    assert chat(model) == [Completion("one\u2028two\x85", "length", Usage(9, 8, 4))]


def test_the_end_of_a_stream_ends_its_answers(start: Start) -> None:
    _, model = start(lambda path, body: streamed(delta(content="one")))  # nobody says why it ended
    assert chat(model) == [Completion("one", "stop", Usage())]


def test_calls_come_in_pieces_and_are_typed(start: Start) -> None:
    answer = streamed(
        delta(role="assistant", content=None),
        delta(tool_calls=[{"index": 0, "id": "c1", "function": {"name": "read_file", "arguments": ""}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": '{"path": "a.py",'}}]),
        delta(tool_calls=[{"index": 1, "id": "c2", "function": {"name": "read_file", "arguments": '{"path":"b"}'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": ' "lines": "3"}'}}]),
        delta(finish="tool_calls"),
    )
    _, model = start(lambda path, body: answer)
    (got,) = chat(model, tools=[READ])
    assert [(c.id, c.arguments, c.errors) for c in got.tool_calls] == [
        ("c1", {"path": "a.py", "lines": 3}, ()),
        ("c2", {"path": "b"}, ()),
    ]
    assert got.finish_reason == "tool_calls" and got.text == ""


def test_arguments_may_be_an_object_and_an_id_missing(start: Start) -> None:
    call = {"function": {"name": "read_file", "arguments": {"path": "a.py"}}}
    _, model = start(lambda path, body: said("", [call], content=None))
    (got,) = chat(model, tools=[READ])
    assert got.tool_calls[0].arguments == {"path": "a.py"} and got.tool_calls[0].id
    assert got.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    "text",
    [
        'I look.<tool_call>\n{"name": "read_file", "arguments": {"path": "a.py"}}\n</tool_call>',
        "I look.<tool_call>\n<function=read_file>\n<parameter=path>\na.py\n</parameter>\n</function>\n</tool_call>",
    ],
)
def test_calls_that_the_server_left_in_the_text_are_read(start: Start, text: str) -> None:
    _, model = start(lambda path, body: said(text))
    (got,) = chat(model, tools=[READ])
    assert [(c.name, c.arguments) for c in got.tool_calls] == [("read_file", {"path": "a.py"})]
    assert got.text == "I look." and got.finish_reason == "tool_calls"
    (plain,) = chat(model)
    assert plain.text == text, "without tools it is text"


def test_thoughts_are_no_part_of_the_answer(start: Start) -> None:
    _, model = start(lambda path, body: said("<think>\nhm\n</think>\n\nyes", reasoning_content="hm"))
    assert chat(model)[0].text == "yes"


@pytest.mark.parametrize("broken", [{}, {"choices": [{}]}, [], {"choices": 3}])
def test_an_answer_without_the_apis_shape_is_one_sentence(start: Start, broken: Any) -> None:
    _, model = start(lambda path, body: JSONResponse(broken))
    with pytest.raises(UserError, match="without the API's shape"):
        chat(model)


# fields that a server refuses ----------------------------------------------------------------------------------------


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


# filling in the middle -----------------------------------------------------------------------------------------------


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


# scores --------------------------------------------------------------------------------------------------------------


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


# what goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind", "sentence"),
    [
        (401, {"error": {"message": "Invalid key"}}, UserError, "refused the key: Invalid key; set LSP_AGENT_BACKEND"),
        (404, {"error": {"message": "The model `x` does not exist."}}, UnknownModel, "it has qwen2.5-coder-7b: set b"),
        (404, "<html>not here</html>", UserError, "has no such path: is backend.url right"),
        (400, {"error": {"message": "n", "code": "context_length_exceeded"}}, PromptTooLong, "does not fit"),
        (
            400,
            {"object": "error", "message": "This model's maximum context length is 8 tokens."},
            PromptTooLong,
            "maximum context length is 8",
        ),
        (400, {"error": {"type": "exceed_context_size_error", "message": "too big"}}, PromptTooLong, "too big"),
        (413, "", PromptTooLong, "does not fit"),
        (422, {"detail": [{"loc": ["body", "messages"], "msg": "bad"}]}, UserError, "HTTP 422.: body.messages: bad"),
        (500, {"error": "it broke"}, UserError, "HTTP 500.: it broke"),
        (307, "", UserError, "another address: set backend.url"),
        (503, {"error": {"message": "Loading"}}, UserError, "is busy: Loading; try again later"),
        (200, {"error": {"message": "odd"}}, UserError, "HTTP 200.: odd"),
    ],
)
def test_each_refusal_is_one_sentence(start: Start, status: int, body: Any, kind: Any, sentence: str) -> None:
    headers = {"retry-after": "3600", "location": "https://elsewhere.example/v1"}
    _, model = start(lambda path, _: refused(status, body, **headers))
    with pytest.raises(kind, match=sentence) as caught:
        chat(model)
    assert "\n" not in str(caught.value)


def test_an_error_in_mid_stream_is_told(start: Start) -> None:
    _, model = start(lambda path, body: streamed(delta(content="a"), {"error": {"message": "out of memory"}}))
    with pytest.raises(UserError, match="out of memory"):
        chat(model)


def test_a_busy_server_is_waited_for_as_long_as_it_asks(start: Start) -> None:
    answers = [refused(429, {}, **{"retry-after": "0"}), refused(503, "", **{"retry-after": "0.01"}), said("hi")]
    server, model = start(lambda path, body: answers[len(server.asked) - 1])
    assert chat(model)[0].text == "hi" and len(server.asked) == 3


def test_waiting_for_a_busy_server_ends_with_the_cancellation(start: Start) -> None:
    cancel = CancelToken()

    def answer(path: str, body: dict[str, Any]) -> Response:
        cancel.cancel()
        return refused(503, "", **{"retry-after": "50"})

    _, model = start(answer)
    with pytest.raises(Cancelled):
        model.chat(HELLO, Sampling(), cancel)


def test_a_dropped_connection_is_tried_again_once(start: Start) -> None:
    broken = [streamed(delta(content="on"), breaks=True), streamed(delta(content="on"), done=False)]
    server, model = start(lambda path, body: broken.pop() if broken else said("hi"))
    with pytest.raises(UserError, match="broke twice"):
        chat(model)
    assert len(server.asked) == 2
    broken.append(streamed(delta(content="on"), breaks=True))
    assert chat(model)[0].text == "hi" and len(server.asked) == 4


def test_a_gateway_error_is_tried_again_once(start: Start) -> None:
    server, model = start(lambda path, body: refused(502, "bad gateway") if len(server.asked) < 2 else said("hi"))
    assert chat(model)[0].text == "hi"


def test_cancelling_closes_the_connection(start: Start) -> None:
    cancel = CancelToken()

    async def forever() -> Any:
        try:
            yield b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
            cancel.cancel()
            await asyncio.Event().wait()
        finally:
            server.left.set()

    server, model = start(lambda path, body: StreamingResponse(forever(), media_type="text/event-stream"))
    with pytest.raises(Cancelled):
        model.chat(HELLO, Sampling(), cancel)
    assert server.left.wait(5)


def test_closing_the_model_ends_its_requests(start: Start) -> None:
    asked = threading.Event()

    async def forever() -> Any:
        asked.set()
        await asyncio.Event().wait()
        yield b""

    _, model = start(lambda path, body: StreamingResponse(forever(), media_type="text/event-stream"))
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            chat(model)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert asked.wait(5)
    model.close()
    thread.join(5)
    assert [type(error) for error in ended] == [Cancelled]
    with pytest.raises(Cancelled):
        chat(model)
