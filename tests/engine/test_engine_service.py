"""The engine as a process of its own: what its client can rely on. Uses the real 0.5B model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Message, Sampling, ToolSchema
from lsp_agent.engine.service import client
from lsp_agent.engine.service.client import EngineModel
from lsp_agent.errors import Cancelled, UserError
from lsp_agent.models import open_model, store

pytestmark = pytest.mark.model

PREFIX = "def area(width, height):\n    "
SUFFIX = "\n\n\nprint(area(2, 3))\n"
MIDDLE = "return width * height"
LINE = Sampling(max_tokens=16, stop=("\n",))
STORY = [{"role": "user", "content": "Tell a very long story about a lighthouse."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineModel]:
    try:
        installed = store.resolve("qwen2.5-coder-0.5b")
    except UserError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSP_AGENT_STATE_DIR", str(tmp_path_factory.mktemp("state")))
        opened = EngineModel(installed.name, installed.path, tier="small", context_length=2048)
    yield opened
    opened.close()


def ask(model: EngineModel, path: str, body: dict[str, object]) -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.AsyncHTTPTransport(uds=str(model.process.socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as http:
            return await http.post(path, json=body)

    return asyncio.run(post())


def test_infill_answers_with_what_fits_between(model: EngineModel) -> None:
    [answer] = model.infill(PREFIX, SUFFIX, LINE, CancelToken())
    assert answer.text == MIDDLE
    assert answer.finish_reason == "stop"
    assert answer.mean_logprob is not None and answer.mean_logprob < 0


def test_the_second_question_about_a_text_reads_only_what_is_new(model: EngineModel) -> None:
    first = model.infill("# a comment\n" * 20 + PREFIX, SUFFIX, LINE, CancelToken())[0].usage
    second = model.infill("# a comment\n" * 20 + PREFIX, SUFFIX + "# more\n", LINE, CancelToken())[0].usage
    assert second.cached_tokens >= first.prompt_tokens - 20
    assert second.prompt_tokens - second.cached_tokens < 20


def test_n_answers_count_their_prompt_once(model: EngineModel) -> None:
    answers = model.infill(PREFIX, SUFFIX, Sampling(max_tokens=8, temperature=1.0, seed=1), CancelToken(), n=3)
    assert len(answers) == 3
    assert [answer.usage.prompt_tokens > 0 for answer in answers] == [True, False, False]


def test_the_same_seed_draws_the_same_answers(model: EngineModel) -> None:
    """From the same cache: rounding of activations to int8 makes a prompt read in other pieces differ a little."""
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=1)
    model.infill(PREFIX, SUFFIX, sampling, CancelToken())
    first, second = (
        [answer.text for answer in model.infill(PREFIX, SUFFIX, sampling, CancelToken(), n=3)] for _ in range(2)
    )
    assert first == second
    other = Sampling(max_tokens=8, temperature=1.0, seed=2)
    assert [answer.text for answer in model.infill(PREFIX, SUFFIX, other, CancelToken(), n=3)] != first


def test_a_wrong_operator_is_the_surprising_token(model: EngineModel) -> None:
    text = "def add(a, b):\n    return a - b\n"
    scores = model.score(text, CancelToken())
    assert text[min(scores, key=lambda s: s.logprob).start :].startswith(" - b")


def test_cancel_stops_decoding_and_the_engine_is_free_at_once(model: EngineModel) -> None:
    cancel = CancelToken()
    threading.Timer(0.5, cancel.cancel).start()
    with pytest.raises(Cancelled):
        model.chat(STORY, Sampling(max_tokens=1500), cancel)
    started = time.monotonic()
    model.chat([{"role": "user", "content": "Hi"}], Sampling(max_tokens=2), CancelToken())
    assert time.monotonic() - started < 10


def test_a_prompt_beyond_the_context_is_refused_in_one_sentence(model: EngineModel) -> None:
    with pytest.raises(UserError, match=r"context holds 2048"):
        model.chat([{"role": "user", "content": "word " * 3000}], Sampling(), CancelToken())


def test_only_the_user_can_open_the_socket(model: EngineModel) -> None:
    assert stat.S_IMODE(model.process.socket.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(model.process.socket.parent.stat().st_mode) == 0o700


def test_the_log_is_the_users_alone_and_holds_no_prompt(model: EngineModel) -> None:
    model.chat([{"role": "user", "content": "PURPLE-ELEPHANT"}], Sampling(max_tokens=1), CancelToken())
    assert stat.S_IMODE(model.process.log.stat().st_mode) == 0o600
    assert "PURPLE" not in model.process.log.read_text()


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/v1/completions", {"prompt": "x", "temperature": -1}, "temperature"),
        ("/v1/completions", {"prompt": "x", "colour": "red"}, "colour"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "empty"),
        ("/v1/completions", {"prompt": "x", "echo": True}, "echo"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
    ],
)
def test_a_bad_request_gets_the_apis_error_shape(
    model: EngineModel, path: str, body: dict[str, object], names: str
) -> None:
    response = ask(model, path, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert names in error["message"]


def test_a_killed_engine_is_started_again_and_the_question_answered(model: EngineModel) -> None:
    before = model.process.pid
    os.kill(before, signal.SIGKILL)
    [answer] = model.infill(PREFIX, SUFFIX, LINE, CancelToken())
    assert answer.text == MIDDLE
    assert model.process.pid != before


def test_an_engine_killed_while_it_answers_is_asked_again(model: EngineModel) -> None:
    pid = model.process.pid
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    [answer] = model.chat(STORY, Sampling(max_tokens=120), CancelToken())
    assert answer.finish_reason in ("stop", "length")
    assert model.process.pid != pid


def test_an_idle_engine_gives_its_memory_back_and_comes_again(
    small_model: store.InstalledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "IDLE_SECONDS", 0.5)
    model = EngineModel(small_model.name, small_model.path, tier="small", context_length=512)
    try:
        assert model.process.ended(within_s=30)
        assert model.infill(PREFIX, SUFFIX, LINE, CancelToken())[0].text == MIDDLE
    finally:
        model.close()
    with pytest.raises(Cancelled):
        model.infill(PREFIX, SUFFIX, LINE, CancelToken())


def test_the_engine_ends_with_its_parent_even_by_kill_9(small_model: store.InstalledModel) -> None:
    program = textwrap.dedent(
        f"""
        import time
        from lsp_agent.models import open_model
        process = open_model({small_model.name!r}).process
        print(process.pid, process.socket.parent, flush=True)
        time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        engine = int(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{engine}").exists() and not _zombie(engine):
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.05)
    assert not Path(folder).exists(), "its socket stayed behind"


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_code_in_the_current_folder_is_never_imported(
    small_model: store.InstalledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("uvicorn", "queue", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    model = EngineModel(small_model.name, small_model.path, tier="small", context_length=512)
    model.close()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("variable", ["XDG_RUNTIME_DIR", "TMPDIR"])
def test_an_unusable_folder_for_sockets_is_passed_over(
    small_model: store.InstalledModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    monkeypatch.setenv(variable, str(long if variable == "TMPDIR" else tmp_path / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    model = EngineModel(small_model.name, small_model.path, tier="small", context_length=512)
    folder = model.process.socket.parent
    assert len(str(model.process.socket)) < 107
    model.close()
    assert not folder.exists()


def test_a_damaged_package_is_one_sentence(small_model: store.InstalledModel, tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    for file in small_model.path.iterdir():
        if file.name != "weights.bin":
            (package / file.name).write_bytes(file.read_bytes())
    (package / "weights.bin").write_bytes(b"\0" * 100)
    with pytest.raises(UserError):
        EngineModel("broken", package, tier="small", context_length=512)


def test_an_unknown_model_is_one_sentence() -> None:
    with pytest.raises(UserError, match="model"):
        open_model("no-such-model")


READ_FILE = ToolSchema(
    "read_file",
    "Read the first lines of a file",
    {
        "type": "object",
        "properties": {"path": {"type": "string"}, "lines": {"type": "integer"}},
        "required": ["path", "lines"],
    },
)
PORT: list[Message] = [{"role": "user", "content": "Read the first 20 lines of settings.toml and tell me the port."}]
SETTINGS = 'host = "localhost"\nport = 8417\n'


def call_and_result(asked: EngineModel) -> list[Message]:
    """Ask, check the call that comes back, and give the conversation that goes on after its result."""
    [answer] = asked.chat(PORT, Sampling(max_tokens=100), CancelToken(), tools=[READ_FILE])
    [call] = answer.tool_calls
    assert answer.finish_reason == "tool_calls" and not answer.problems
    assert (call.name, call.arguments, call.errors) == ("read_file", {"path": "settings.toml", "lines": 20}, ())
    return [
        *PORT,
        {"role": "assistant", "content": answer.text, "tool_calls": answer.tool_calls},
        {"role": "tool", "tool_call_id": call.id, "content": SETTINGS},
    ]


def test_a_tool_is_called_with_typed_arguments(model: EngineModel) -> None:
    conversation = call_and_result(model)
    first = model.chat(PORT, Sampling(max_tokens=1), CancelToken(), tools=[READ_FILE])[0].usage
    after = model.chat(conversation, Sampling(max_tokens=1), CancelToken(), tools=[READ_FILE])[0].usage
    assert after.prompt_tokens > first.prompt_tokens
    assert after.cached_tokens >= first.prompt_tokens - 1


def test_a_stream_says_what_the_whole_answer_says(model: EngineModel) -> None:
    body = {"messages": [{"role": "user", "content": "Count to five."}], "max_tokens": 24}
    whole = ask(model, "/v1/chat/completions", body).json()["choices"][0]
    *blocks, done, _ = ask(model, "/v1/chat/completions", {**body, "stream": True}).text.split("\n\n")
    choices = [json.loads(block.removeprefix("data: "))["choices"][0] for block in blocks]
    assert done == "data: [DONE]"
    assert len(choices) > 5
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["message"]["content"]
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + [whole["finish_reason"]]


def test_a_client_that_leaves_a_stream_frees_the_engine(model: EngineModel) -> None:
    async def leave() -> None:
        transport = httpx.AsyncHTTPTransport(uds=str(model.process.socket))
        body = {"messages": STORY, "max_tokens": 1500, "stream": True}
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as http,
            http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            async for line in response.aiter_lines():
                if '"content"' in line:
                    return

    asyncio.run(leave())
    started = time.monotonic()
    model.chat([{"role": "user", "content": "Hi"}], Sampling(max_tokens=2), CancelToken())
    assert time.monotonic() - started < 10


def test_a_tools_result_is_answered_from() -> None:
    """The 0.5B model calls its tool again and again, the 1.5B model answers once no tools are on offer."""
    try:
        installed = store.resolve("qwen2.5-coder-1.5b")
    except UserError as error:
        pytest.skip(str(error))
    larger = EngineModel(installed.name, installed.path, tier="small", context_length=2048)
    try:
        [answer] = larger.chat(call_and_result(larger), Sampling(max_tokens=40), CancelToken())
    finally:
        larger.close()
    assert "8417" in answer.text
    assert answer.finish_reason == "stop"
