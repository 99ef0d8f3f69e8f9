"""Against a real llama.cpp server with the 0.5B model: what it does differently is handled (make test-llama)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import AnswerFormat, ChatOptions, Message, Sampling, ToolSchema
from lsp_agent.config import Backend
from lsp_agent.engine.remote.backend import KEY_VARIABLE, open_backend
from lsp_agent.engine.remote.openai_model import OpenAiModel
from lsp_agent.errors import Cancelled, PromptTooLong, Unsupported, UserError

pytestmark = pytest.mark.llama

KEY = "sk-of-the-test"
SERVER, GGUF = os.environ.get("LSP_AGENT_LLAMA_SERVER", ""), os.environ.get("LSP_AGENT_LLAMA_GGUF", "")
SLOTS, CONTEXT = 2, 2048
PREFIX, SUFFIX = "def area(width, height):\n    ", "\n\n\nprint(area(2, 3))\n"
READ = ToolSchema(
    "read_file", "Read a file.", {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not (os.access(SERVER, os.X_OK) and Path(GGUF).is_file()):
        pytest.skip("set LSP_AGENT_LLAMA_SERVER and LSP_AGENT_LLAMA_GGUF, or use make test-llama")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    command = [SERVER, "-m", GGUF, "--host", "127.0.0.1", "--port", port, "--api-key", KEY, "--slots"]
    command += ["-c", str(SLOTS * CONTEXT), "-np", str(SLOTS), "-t", "1"]
    with (
        (tmp_path_factory.mktemp("llama") / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            root = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 60
            while not _healthy(root):
                assert process.poll() is None and time.monotonic() < deadline, "llama-server did not start"
                time.sleep(0.05)
            yield f"{root}/v1"
        finally:
            process.kill()


def _healthy(root: str) -> bool:
    try:
        return httpx.get(f"{root}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def model(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAiModel]:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    # The file may be called anything, so the family is told.
    opened = open_backend(Backend(url=url, family="qwen"))
    yield opened
    opened.close()


def say(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def test_it_says_what_it_has(model: OpenAiModel) -> None:
    assert (model.context_length, model.tier) == (CONTEXT, "small")


def test_a_wrong_key_is_one_sentence(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "wrong")
    with pytest.raises(UserError, match="refused the key"):
        open_backend(Backend(url=url)).chat(say("hi"), Sampling(max_tokens=1), CancelToken())


def test_a_conversation_is_read_once(model: OpenAiModel) -> None:
    messages = say("Answer with one word: what is the capital of France?")
    options = ChatOptions(prediction="Paris", urgent=True)
    (first,) = model.chat(messages, Sampling(max_tokens=16), CancelToken(), options=options)
    assert "Paris" in first.text and first.finish_reason == "stop" and first.usage.completion_tokens > 0
    messages += [{"role": "assistant", "content": first.text}, *say("And of Italy?")]
    (second,) = model.chat(messages, Sampling(max_tokens=16), CancelToken())
    assert "Rome" in second.text and second.usage.cached_tokens > 20


def test_a_stop_text_ends_the_answer(model: OpenAiModel) -> None:
    asked = say("Count from one to five in words, separated by spaces.")
    (answer,) = model.chat(asked, Sampling(max_tokens=30, stop=("three", "Three")), CancelToken())
    assert "two" in answer.text.lower() and "three" not in answer.text.lower()


@pytest.mark.parametrize("n", [SLOTS, SLOTS + 1])
def test_several_answers_also_where_it_has_too_few_slots(model: OpenAiModel, n: int) -> None:
    asked = say("Invent a name for a cat. Answer with the name only.")
    answers = model.chat(asked, Sampling(max_tokens=8, temperature=1.5, seed=1), CancelToken(), n=n)
    assert len(answers) == n and len({a.text for a in answers}) > 1


def test_filling_in_the_middle_with_the_models_own_prompt(model: OpenAiModel) -> None:
    (answer,) = model.infill(PREFIX, SUFFIX, Sampling(max_tokens=16, stop=("\n",)), CancelToken())
    assert answer.text == "return width * height"


def test_filling_in_the_middle_by_the_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    model = open_backend(Backend(url=url, family="none"))
    (answer,) = model.infill(PREFIX, SUFFIX, Sampling(max_tokens=16, stop=("\n",)), CancelToken())
    model.close()
    assert answer.text.strip() and "\n" not in answer.text and answer.usage.prompt_tokens > 10


def test_tools_are_called_whoever_reads_the_calls(model: OpenAiModel) -> None:
    """The 0.5B model writes calls as it likes, which the server leaves in the text; a required one it forces."""
    asked = say("Read the file a.py.")
    (free,) = model.chat(asked, Sampling(max_tokens=64), CancelToken(), tools=[READ])
    assert [(c.name, c.arguments) for c in free.tool_calls] == [("read_file", {"path": "a.py"})]
    options = ChatOptions(tool_choice="read_file")
    (forced,) = model.chat(asked, Sampling(max_tokens=64), CancelToken(), tools=[READ], options=options)
    assert forced.tool_calls[0].name == "read_file"


def test_an_answer_is_kept_to_a_schema_but_not_to_an_expression(model: OpenAiModel) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    options = ChatOptions(answer_format=AnswerFormat("json_schema", json.dumps(schema)))
    (answer,) = model.chat(say("How old is Anna, who is 31?"), Sampling(max_tokens=30), CancelToken(), options=options)
    assert isinstance(json.loads(answer.text)["age"], int)
    with pytest.raises(Unsupported, match="JSON schema"):
        model.chat(say("x"), Sampling(), CancelToken(), options=ChatOptions(answer_format=AnswerFormat("regex", "a")))


def test_what_it_cannot_do_is_said(model: OpenAiModel) -> None:
    with pytest.raises(Unsupported, match="does not tell how likely"):
        model.score("a = 1", CancelToken())
    with pytest.raises(PromptTooLong):
        model.chat(say("word " * (CONTEXT + 100)), Sampling(max_tokens=4), CancelToken())


def test_cancelling_frees_the_slot(url: str, model: OpenAiModel) -> None:
    cancel = CancelToken()
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            model.chat(say("Tell a very long story about a lighthouse."), Sampling(max_tokens=1500), cancel)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    _until(lambda: _busy(url) == 1)
    cancel.cancel()
    thread.join(2)
    assert [type(error) for error in ended] == [Cancelled]
    _until(lambda: _busy(url) == 0)


def _busy(url: str) -> int:
    slots = httpx.get(f"{url.removesuffix('/v1')}/slots", headers={"Authorization": f"Bearer {KEY}"}).json()
    return sum(slot["is_processing"] for slot in slots)


def _until(condition: object, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


CODE = '''def mean(times):
    """Return the arithmetic mean of the times; 0.0 when there are none."""
    if not times:
        return 0.0
    return sum(times) / (len(times) - 1)
'''
TEST = """from laps import mean


def test_mean_of_laps():
    assert mean([60, 70, 80]) == 70


def test_mean_of_one_lap():
    assert mean([5]) == 5


def test_mean_of_nothing():
    assert mean([]) == 0.0
"""


def test_a_bug_is_fixed_with_it(url: str, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "laps.py").write_text(CODE)
    (project / "test_laps.py").write_text(TEST)
    given = {KEY_VARIABLE: KEY, "LSP_AGENT_BACKEND__URL": url, "LSP_AGENT_BACKEND__FAMILY": "qwen"}
    command = [sys.executable, "-m", "lsp_agent", "fix", str(project), "--json", "--max-seconds", "150"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **given}, timeout=200)
    result = json.loads(done.stdout)
    assert result["status"] == "green", (done.stderr, done.stdout)
    assert result["fixed"] == ["test_laps.py::test_mean_of_laps", "test_laps.py::test_mean_of_one_lap"]
    assert result["turns"] >= 1 and result["tokens"]["completion"] > 0
    assert KEY not in Path(result["trajectory"]).read_text() + done.stdout + done.stderr
