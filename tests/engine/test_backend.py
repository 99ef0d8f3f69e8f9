"""Opening a model on somebody else's server: its key, what the server says of itself, and what can be wrong there."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from model_servers import ModelServer, refused, said

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.cli import app
from lsp_agent.config import Backend
from lsp_agent.engine.remote import backend as backends
from lsp_agent.engine.remote.backend import check, key_of, open_backend
from lsp_agent.engine.remote.openai_model import OpenAiModel
from lsp_agent.engine.scripted import ScriptedModel
from lsp_agent.errors import ExitCode, UnknownModel, UserError
from lsp_agent.models import open_model

SECRET = "sk-very-secret"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_from_keyring", lambda url: "")


@pytest.fixture
def server(model_server: ModelServer) -> ModelServer:
    model_server.serve(lambda path, body: said("hi"))
    return model_server


def test_the_server_says_what_it_has(server: ModelServer) -> None:
    server.models = [{"id": "coder", "owned_by": "vllm", "root": "Qwen/Qwen2.5-Coder-7B", "max_model_len": 4096}]
    found = check(Backend(url=server.url))
    assert (found.name, found.kind, found.context_length, found.tier) == ("coder", "vllm", 4096, "medium")
    assert found.family is not None and found.family.name == "qwen"
    server.models = [{"id": "x.gguf", "owned_by": "llamacpp", "meta": {"n_ctx": 2048, "n_params": 630_000_000}}]
    found = check(Backend(url=server.url))
    assert (found.kind, found.context_length, found.tier, found.family) == ("llama.cpp", 2048, "small", None)


def test_settings_win_over_what_the_server_says(server: ModelServer) -> None:
    server.models = [{"id": "Qwen3-Coder-Next", "max_model_len": 262144}]
    assert check(Backend(url=server.url)).tier == "large"
    set_by_hand = Backend(url=server.url, context_length=1000, tier="medium", family="none")
    found = check(set_by_hand)
    assert (found.context_length, found.tier, found.family) == (1000, "medium", None)


def test_one_of_several_models_has_to_be_chosen(server: ModelServer) -> None:
    server.models = [{"id": "first"}, {"id": "second:latest"}]
    with pytest.raises(UserError, match=r"several models \(first, second:latest\): set backend"):
        check(Backend(url=server.url))
    assert check(Backend(url=server.url, model="second")).name == "second"
    with pytest.raises(UnknownModel, match="no model 'third'; it has first, second:latest"):
        check(Backend(url=server.url, model="third"))


def test_a_server_that_lists_nothing_is_believed(server: ModelServer) -> None:
    server.models, server.answer = [], lambda path, body: said("hi")
    with pytest.raises(UserError, match="does not say which models it has: set backend"):
        check(Backend(url=server.url))
    assert check(Backend(url=server.url, model="gpt")).name == "gpt"


def test_the_key_is_sent_and_shown_nowhere(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv(backends.KEY_VARIABLE, f" {SECRET}\n")
    model = open_backend(Backend(url=server.url))
    server.answer = lambda path, body: refused(401, {"error": {"message": "Invalid key"}})
    with pytest.raises(UserError, match="refused the key") as caught:
        model.chat([{"role": "user", "content": "x"}], Sampling(), CancelToken())
    assert server.headers["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in caplog.text + str(caught.value) + repr(model._connection.endpoint.address(CancelToken()))
    model.close()


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://models.example/v1", False),
        ("http://10.0.0.1:8000/v1", False),
        ("http://localhost.example/v1", False),
        ("https://models.example/v1", True),
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://[::1]:8000/v1", True),
    ],
)
def test_the_key_crosses_no_network_in_clear(url: str, sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.KEY_VARIABLE, SECRET)
    if sent:
        assert key_of(Backend(url=url)) == (SECRET, "environment")
        return
    with pytest.raises(UserError, match="use https") as caught:
        open_backend(Backend(url=url))
    assert SECRET not in str(caught.value)


def test_a_key_that_no_header_can_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backends.KEY_VARIABLE, "sk\nX-Other: 1")
    with pytest.raises(UserError, match="characters that no key has"):
        key_of(Backend(url="https://models.example"))


def test_the_key_may_be_kept_in_the_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = pytest.importorskip("keyring", reason="keyring is an optional package")
    monkeypatch.undo()
    monkeypatch.delenv(backends.KEY_VARIABLE, raising=False)
    kept = {("lsp-agent", "https://models.example"): SECRET}
    monkeypatch.setattr(keyring, "get_password", lambda service, name: kept.get((service, name)))
    assert key_of(Backend(url="https://models.example/v1")) == (SECRET, "keyring")
    assert key_of(Backend(url="https://other.example/v1")) == ("", "")

    def locked(service: str, name: str) -> str:
        raise keyring.errors.KeyringLocked

    monkeypatch.setattr(keyring, "get_password", locked)
    assert key_of(Backend(url="https://models.example/v1")) == ("", "")


def test_no_proxy_lies_before_this_machine(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "")
    assert check(Backend(url=server.url)).name == "qwen2.5-coder-7b"


def test_a_server_that_does_not_run_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError, match=f"Cannot reach the model server http://127.0.0.1:{port}/v1"):
        check(Backend(url=f"http://127.0.0.1:{port}"))


@pytest.fixture
def tls_port(tmp_path: Path) -> Iterator[int]:
    """A loopback port where TLS is spoken with a certificate that nobody signed."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl makes the certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "1", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):  # the client leaves in the handshake
                    context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def test_a_certificate_that_is_not_trusted_is_said_to_be(tls_port: int) -> None:
    with pytest.raises(UserError, match=r"not trusted \(self.signed certificate\): set SSL_CERT"):
        check(Backend(url=f"https://localhost:{tls_port}"))


def test_https_to_a_server_without_it_is_told(server: ModelServer) -> None:
    with pytest.raises(UserError, match=r"no encrypted connection .* is it http"):
        check(Backend(url=server.url.replace("http:", "https:")))


@pytest.mark.parametrize(
    ("url", "variable", "value"),
    [
        ("https://127.0.0.1:9/v1", "SSL_CERT_FILE", "/no/such/file"),
        ("https://models.example/v1", "HTTPS_PROXY", "garbage://proxy"),
        ("http://\u2603\u2603.-/v1", "", ""),
    ],
)
def test_surroundings_that_cannot_work_are_one_sentence(
    url: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=r"cannot be asked .*: check that address"):
        check(Backend(url=url))


def test_a_list_of_models_of_odd_shape_is_read_as_far_as_it_goes(server: ModelServer) -> None:
    server.models = [{"id": "x", "meta": [1], "aliases": 5}]
    assert check(Backend(url=server.url, model="x")).name == "x"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, standalone_mode=False)


def test_doctor_shows_and_checks_it(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_BACKEND__URL", server.url)
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", "/nonexistent")  # what this machine lacks does not matter
    monkeypatch.setenv(backends.KEY_VARIABLE, SECRET)
    server.models[0]["max_model_len"] = 4096
    shown = run("doctor", "--json")
    report = json.loads(shown.output)
    assert report["usable"] and shown.return_value == 0 and report["model"] == "qwen2.5-coder-7b"
    assert report["backend"] == {
        "url": server.url,
        "model": "qwen2.5-coder-7b",
        "key": "environment",
        "problem": "",
        "server": "vllm",
        "context_length": 4096,
        "tier": "medium",
        "family": "qwen",
    }
    text = " ".join(run("doctor").output.split())
    assert f"on {server.url} (vllm, medium, 4,096 tokens, key from the environment)" in text
    assert SECRET not in shown.output + text


def test_doctor_says_what_is_wrong_with_it(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_BACKEND__URL", server.url)
    monkeypatch.setenv("LSP_AGENT_BACKEND__MODEL", "gpt")
    shown = run("doctor")
    assert shown.return_value == ExitCode.ENVIRONMENT
    assert "has no model 'gpt'; it has qwen2.5-coder-7b" in shown.output


def test_a_model_without_a_name_is_the_backends(server: ModelServer, tmp_path: Path) -> None:
    backend = Backend(url=server.url)
    model = open_model(None, backend=backend)
    assert isinstance(model, OpenAiModel) and model.name == "qwen2.5-coder-7b"
    model.close()
    script = tmp_path / "script.json"
    script.write_text('{"rules": []}')
    assert isinstance(open_model(f"scripted:{script}", backend=backend), ScriptedModel)
