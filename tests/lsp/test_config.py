"""Settings and where they come from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lsp_agent.config import load_settings
from lsp_agent.errors import ExitCode, UserError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LSP_AGENT_")]:
        monkeypatch.delenv(name)


def test_the_editor_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lsp-agent.toml").write_text('model = "file"\nmax_turns = 3\nmax_seconds = 7\npytest_args = ["-x"]\n')
    monkeypatch.setenv("LSP_AGENT_MODEL", "environment")
    monkeypatch.setenv("LSP_AGENT_MAX_TURNS", "4")
    settings = load_settings(tmp_path, {"lspAgent": {"model": "editor", "runTestsOnSave": "off"}})
    assert (settings.model, settings.max_turns, settings.max_seconds) == ("editor", 4, 7.0)
    assert settings.pytest_args == ("-x",)
    assert settings.run_tests_on_save == "off"


def test_defaults_need_nothing() -> None:
    settings = load_settings(None)
    assert settings.model is None
    assert settings.sandbox
    assert settings.run_tests_on_save == "failing"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("sandbox = false", "may not set 'sandbox'"),
        ('model = "scripted:evil.json"', "installed model only"),
        ('model = "../evil"', "installed model only"),
        ("max_turns = 0", "'max_turns' in lsp-agent.toml"),
        ("max_truns = 5", "there is no such setting"),
        ("max_turns = ", "cannot be read"),
        ("Sandbox = false", "'Sandbox' in lsp-agent.toml .* there is no such setting"),
        ('Model = "scripted:evil.json"', "there is no such setting"),
        ('BACKEND = {url = "https://models.example"}', "there is no such setting"),
        ('INTERPRETER = "/usr/bin/python3"', "there is no such setting"),
        ("a = " + "[" * 10_000, "cannot be read"),
        ('interpreter = "/usr/bin/python3"', "inside the workspace only"),
        ('interpreter = "~/bin/python"', "inside the workspace only"),
        ('interpreter = "env/../../python"', "inside the workspace only"),
        ("interpreter = 3", "'interpreter' in lsp-agent.toml"),
        ('backend = {url = "https://models.example"}', "may not set 'backend'"),
        ('[backend]\nurl = "https://models.example"', "set it in your editor or as LSP_AGENT_BACKEND__URL"),
    ],
)
def test_a_bad_file_gives_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "lsp-agent.toml").write_text(content)
    with pytest.raises(UserError, match=sentence) as caught:
        load_settings(tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("PYTEST_ARGS", "-x", "LSP_AGENT_PYTEST_ARGS is not usable: give a JSON list"),
        ("PYTEST_ARGS", "3", "'pytest_args' in the environment"),
        ("INTERPRETER", "~no-such-user-here/python", "'interpreter' in the environment .* home folder"),
        ("MAX_TURNS", "many", "'max_turns' in the environment"),
        ("BACKEND__URL", "models.example", "'backend.url' in the environment .* an address such as https://"),
        ("BACKEND__URL", "https://me:secret@models.example", "give the key as LSP_AGENT_BACKEND_KEY"),
        ("BACKEND__FAMILY", "llama", "'backend.url' in the environment is not usable: field required"),
        ("BACKEND", "https://models.example", "LSP_AGENT_BACKEND__URL"),
    ],
)
def test_a_bad_variable_gives_one_sentence(
    name: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"LSP_AGENT_{name}", value)
    with pytest.raises(UserError, match=sentence) as caught:
        load_settings(None)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_bad_option_names_the_editor() -> None:
    with pytest.raises(UserError, match=r"'run_tests_on_save' in the editor's options"):
        load_settings(None, {"runTestsOnSave": "sometimes"})


def test_the_user_may_switch_the_sandbox_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_SANDBOX", "false")
    assert not load_settings(None).sandbox


def test_a_relative_interpreter_is_the_workspaces(tmp_path: Path) -> None:
    (tmp_path / "lsp-agent.toml").write_text('interpreter = "env/bin/python"\n')
    assert load_settings(tmp_path).interpreter == tmp_path / "env/bin/python"
    (tmp_path / "lsp-agent.toml").write_text(f'interpreter = "{tmp_path}/env/bin/python"\n')
    assert load_settings(tmp_path).interpreter == tmp_path / "env/bin/python"
    assert load_settings(tmp_path, {"interpreter": "/usr/bin/python3"}).interpreter == Path("/usr/bin/python3")


def test_a_backend_is_set_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSP_AGENT_BACKEND__URL", "http://[::1]:8000")
    monkeypatch.setenv("LSP_AGENT_BACKEND__MODEL", "coder")
    backend = load_settings(None, {"lspAgent": {"backend": {"contextLength": 4096}}}).backend
    assert backend is not None and backend.is_loopback
    assert (backend.url, backend.model, backend.context_length) == ("http://[::1]:8000/v1", "coder", 4096)
    given = load_settings(None, {"backend": {"url": "https://models.example/api/v3/", "model": None}}).backend
    assert given is not None and not given.is_loopback
    assert (given.url, given.model) == ("https://models.example/api/v3", "coder")


def test_a_key_is_no_setting() -> None:
    with pytest.raises(UserError, match=r"'backend.key' in the editor's options is not usable: there is no such"):
        load_settings(None, {"backend": {"url": "https://models.example", "key": "sk"}})


def test_the_users_backend_wins_over_the_projects_model_and_the_users_model_over_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lsp-agent.toml").write_text('model = "qwen2.5-coder-1.5b"\nmax_turns = 3\n')
    assert load_settings(tmp_path).model == "qwen2.5-coder-1.5b"
    monkeypatch.setenv("LSP_AGENT_BACKEND__URL", "https://models.example")
    settings = load_settings(tmp_path)
    assert settings.model is None and settings.max_turns == 3
    assert load_settings(tmp_path, {"model": "mine"}).model == "mine"
