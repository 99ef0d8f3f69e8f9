"""`lsp-agent model import` with Hugging Face folders: what is read from them, reports, interruptions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from tiny_hf import random_weights, write_hf_checkpoint
from tiny_model import Log, write_runnable_gguf

from lsp_agent import paths
from lsp_agent.cli import app
from lsp_agent.commands import progress
from lsp_agent.engine.checkpoints.checkpoint import open_checkpoint
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import describe, install, store
from lsp_agent.models.identify import identify
from lsp_agent.models.manifest import Manifest

GOLDEN = Path(__file__).parents[1] / "engine" / "golden" / "golden_hf.npz"
CARD = "---\nlanguage: en\nlicense: apache-2.0\ntags:\n- code\n---\n# Model\nlicense: wrong\n"
HERMES = "{{ '<|im_start|>' }}<tool_call>\n{\"name\": …}\n</tool_call>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen3-Next checkpoint with random weights in BF16, four layers."""
    with np.load(GOLDEN) as golden:
        saved = json.loads(str(golden["qwen3-next.checkpoint"]))
    weights = random_weights(saved["shapes"], saved["config"])
    made = write_hf_checkpoint(tmp_path / "Tiny Coder-Next", saved["config"], weights, "BF16", 2)
    (made / "README.md").write_text(CARD)
    return made


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and what a user error says."""
    result = CliRunner().invoke(app, ["model", "import", *map(str, arguments)])
    error = str(result.exception) if isinstance(result.exception, UserError) else ""
    assert result.exception is None or error, result.exception
    return result.exit_code, result.stdout, error


def described(folder: Path, **changes: Any) -> Manifest:
    for name, values in changes.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return describe.manifest_of(open_checkpoint(folder), None)


def test_a_folder_is_installed_and_answers(folder: Path) -> None:
    from lsp_agent.engine.engine import Engine

    code, output, _ = run(folder)
    model = store.resolve(None)
    assert code == 0 and f"Installed tiny-coder-next in {model.path}" in output and "scheme int8" in output
    size = sum(path.stat().st_size for path in model.path.iterdir() if path.name != "manifest.json")
    assert model.manifest.package_bytes == size
    assert store.origin(model.path) == {"file": "Tiny Coder-Next", "scheme": "int8"}
    assert [path.name for path in paths.models_dir().iterdir() if not path.name.startswith(".")] == [model.name]
    assert not any((paths.models_dir() / ".staging").iterdir())
    assert Engine.load(model.path, threads=1).config.layers == 4
    assert "is installed already" in run(folder)[1]


def test_what_a_checkpoint_says_does_nothing_to_the_terminal(folder: Path) -> None:
    named = folder.rename(folder.with_name("Tiny\x1b]0;gone\x07\n\u202eCoder"))
    (named / "README.md").write_text("---\nlicense: [/mit]\x1b[2J\n---\n")
    manifest = described(named)
    assert (manifest.title, manifest.license) == (r"Tiny\x1b]0;gone\x07 \u202eCoder", r"[/mit]\x1b[2J")
    assert run(named, "--name", "tiny")[0] == ExitCode.OK
    listed = CliRunner().invoke(app, ["model", "list"], env={"COLUMNS": "200"})
    assert listed.exception is None
    assert r"[/mit]\x1b[2J" in listed.stdout


def test_what_a_folder_says_about_itself(folder: Path) -> None:
    manifest = described(folder)
    assert (manifest.name, manifest.title, manifest.license) == ("tiny-coder-next", "Tiny Coder-Next", "apache-2.0")
    assert (manifest.architecture, manifest.context_length) == ("qwen3next", 256)
    with np.load(GOLDEN) as golden:
        shapes = json.loads(str(golden["qwen3-next.checkpoint"]))["shapes"]
    assert manifest.parameters == sum(int(np.prod(shape)) for shape in shapes.values())
    routed = sum(int(np.prod(shape)) for name, shape in shapes.items() if ".experts." in name)
    assert manifest.active_parameters == manifest.parameters - routed + routed * 3 // 16
    assert manifest.fim and manifest.fim.middle == "<|fim_middle|>" and "<|im_end|>" in manifest.fim.stop
    assert manifest.chat.stop == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
            (0.7, 20, 0.8),
        ),
        ({"do_sample": True, "top_k": 40, "top_p": 0.95}, (1.0, 40, 0.95)),
        ({"do_sample": False, "temperature": 0.7}, (0.0, 0, 1.0)),
        ({"do_sample": True, "temperature": -1}, (0.0, 0, 1.0)),
        ({}, (0.0, 0, 1.0)),
    ],
)
def test_sampling_is_the_makers(folder: Path, values: dict[str, Any], expected: tuple[float, int, float]) -> None:
    sampling = described(folder, generation_config=values).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == expected


@pytest.mark.parametrize(
    ("template", "calls", "format_"),
    [
        (HERMES, "hermes", "chatml"),
        ("<|im_start|><tool_call>\n<function=name>\n<parameter=x>", "qwen3_coder", "chatml"),
        ("{{ messages }}", "none", "checkpoint"),
    ],
)
def test_tool_calls_follow_the_template(folder: Path, template: str, calls: str, format_: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    chat = described(folder).chat
    assert (chat.tool_calls, chat.format) == (calls, format_)
    (folder / "chat_template.jinja").unlink()
    assert described(folder, tokenizer_config={"chat_template": template}).chat == chat
    several = [{"name": "default", "template": template}]
    assert described(folder, tokenizer_config={"chat_template": several}).chat.tool_calls == calls


def test_licences_and_names(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\n---\n")
    assert described(folder).license == "qwen-research"
    (folder / "README.md").unlink()
    assert described(folder).license == "unknown"
    (folder / "LICENSE").write_text("                     Apache License\n           Version 2.0, January 2004\n")
    assert described(folder).license == "Apache-2.0"
    snapshot = tmp_path / "hub" / "models--Maker--Tiny-7B" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    manifest = described(snapshot)
    assert (manifest.developer, manifest.title, manifest.name) == ("Maker", "Tiny-7B", "tiny-7b")


def test_only_coders_were_trained_for_infilling(folder: Path, tmp_path: Path) -> None:
    assert described(folder).fim
    plain = folder.rename(tmp_path / "Tiny-Next")
    assert described(plain).fim is None


def test_a_tokenizer_without_the_tokens_has_no_infilling(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|fim_middle|>", "<|other_middle|>"))
    assert described(folder).fim is None


def test_the_report_names_classes_and_their_errors(folder: Path) -> None:
    code, output, _ = run(folder, "--scheme", "int4", "--report", "--json")
    result = json.loads(output)
    assert (code, result["name"], result["scheme"], result["new"]) == (0, "tiny-coder-next", "int4", True)
    classes = {entry["name"]: entry for entry in result["report"]}
    assert list(classes) == [
        "embedding", "attention", "linear attention", "experts", "shared expert", "router", "norms and biases", "head",
    ]  # fmt: skip
    assert classes["experts"]["carried_as"] == ["4 bits / 32"] and classes["experts"]["source_types"] == ["BF16"]
    assert 0.02 < classes["experts"]["relative_rms_error"] < 0.11 and classes["experts"]["max_error"] > 0
    assert classes["experts"]["values"] == 4 * 3 * 16 * 32 * 64
    assert classes["head"]["carried_as"] == classes["router"]["carried_as"] == ["8 bits / 32"]
    assert 0.0005 < classes["head"]["relative_rms_error"] < 0.01
    assert classes["norms and biases"]["relative_rms_error"] == classes["embedding"]["relative_rms_error"] == 0
    again = json.loads(run(folder, "--report", "--json")[1])
    assert (again["new"], again["report"], again["scheme"]) == (False, result["report"], "int4")
    table = run(folder, "--report")[1]
    assert "relative RMS error" in table and "linear attention" in table and "exact" in table


def test_a_dry_run_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, output, _ = run(folder, "--dry-run", "--report", "--scheme", "int8")
    assert code == 0 and "Would install Tiny Coder-Next as tiny-coder-next: qwen3next" in output
    assert "scheme int8" in output and "experts" in output
    planned = json.loads(run(folder, "--dry-run", "--json", "--scheme", "int8")[1])
    assert not paths.models_dir().exists()
    run(folder, "--scheme", "int8")
    weights = store.resolve("tiny-coder-next").path / "weights.bin"
    assert weights.stat().st_size < planned["package_bytes"] < weights.stat().st_size + 64_000_000
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    code, _, error = run(folder, "--dry-run", "--name", "other")
    assert "GB of disk" in error and "LSP_AGENT_CACHE_DIR" in error


def test_the_report_of_a_gguf_file(tmp_path: Path) -> None:
    path = write_runnable_gguf(tmp_path / "real.gguf")
    result = json.loads(run(path, "--dry-run", "--report", "--json")[1])
    assert result["scheme"] == "keep"
    assert {entry["name"] for entry in result["report"]} >= {"MLP", "attention", "embedding", "head"}
    assert all(entry["relative_rms_error"] < 1e-6 for entry in result["report"])


def test_another_scheme_needs_another_name(folder: Path) -> None:
    run(folder, "--scheme", "int8")
    error = run(folder, "--scheme", "int4")[2]
    assert "installed already, with the scheme int8" in error and "model rm tiny-coder-next" in error
    assert run(folder, "--scheme", "int4", "--name", "four")[0] == 0
    other = folder.rename(folder.with_name("Other"))
    assert "Another model is installed as four" in run(other, "--name", "four")[2]


def test_a_known_name_needs_the_known_size(folder: Path, log: Log) -> None:
    with pytest.raises(UserError, match="is not the model known as qwen3-coder-next; choose another name"):
        identify(folder, "qwen3-coder-next", log)


def test_a_model_whose_hash_is_not_known_is_known_by_name_and_size(
    folder: Path, tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = described(folder).model_dump(include={"parameters", "architecture"})
    toml = (Path(__file__).parents[2] / "models" / "qwen3-coder-next.toml").read_text()
    toml = toml.replace("80_000_000_000", str(int(fields["parameters"] * 1.02)))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "qwen3-coder-next.toml").write_text(toml)
    monkeypatch.setenv("LSP_AGENT_MANIFEST_DIR", str(tmp_path / "own"))
    model = install.import_model(folder, "qwen3-coder-next", log).model
    assert (model.manifest.title, model.manifest.license) == ("Qwen3-Coder-Next", "Apache-2.0")
    assert model.manifest.parameters == fields["parameters"]
    assert "Taking this for Qwen3-Coder-Next" in log.text
    assert install.import_model(folder, "qwen3-coder-next", log).new is False


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json is missing or damaged"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "lacks a readable tokenizer.json"),
        (lambda f: (f / "generation_config.json").write_text("["), "generation_config.json is missing or damaged"),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "lacks model-00002-of-00002.safetensors"),
        (lambda f: os.truncate(f / "model-00001-of-00002.safetensors", 90_000), "truncated or damaged"),
    ],
)
def test_damaged_folders_get_one_sentence(folder: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(folder)
    code, _, error = run(folder)
    assert says in error and "\n" not in error and code != 0
    assert not paths.models_dir().exists() or not any(p for p in paths.models_dir().rglob("*") if p.is_file())


def begin(folder: Path, *, stop: signal.Signals) -> tuple[int, str]:
    """Start `lsp-agent model import` and end it when some weights are journalled; exit code and standard error."""
    slow = (
        "import sys, time\n"
        "from lsp_agent.engine.checkpoints import partial_package, weight_writers\n"
        "fill = weight_writers.WeightImporter.fill\n"
        "partial_package.SYNC_SECONDS = 0.0\n"
        "weight_writers.WeightImporter.fill = lambda *a: (time.sleep(0.05), fill(*a))[1]\n"
        f"sys.argv = ['lsp-agent', 'model', 'import', {str(folder)!r}]\n"
        "from lsp_agent.cli import main\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE, text=True)
    journal = paths.models_dir() / ".staging" / "tiny-coder-next" / ".package.partial" / "journal"
    end = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b'"weight"') < 3:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(stop)
    return process.wait(timeout=30), process.communicate()[1]


def test_a_killed_import_is_continued(folder: Path, log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(folder, stop=signal.SIGKILL)
    assert store.installed() == []
    assert "tiny-coder-next: begun, 0.0 GB; import it again" in CliRunner().invoke(app, ["model", "list"]).stdout
    model = install.import_model(folder, None, log).model
    assert "was interrupted; if it was this one, it is continued" in log.text
    assert "begun" not in CliRunner().invoke(app, ["model", "list"]).stdout
    assert not any((paths.models_dir() / ".staging").iterdir())
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(tmp_path / "other"))
    whole = install.import_model(folder, None, Log()).model
    assert whole.path != model.path
    for path in whole.path.iterdir():
        assert (model.path / path.name).read_bytes() == path.read_bytes()


def test_of_two_imports_at_once_one_waits_and_finds_it(folder: Path) -> None:
    command = [sys.executable, "-m", "lsp_agent", "model", "import", str(folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    answers = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0].startswith("Installed tiny-coder-next in")
    assert answers[1] == "tiny-coder-next is installed already.\n"


def test_info_says_the_scheme(folder: Path) -> None:
    run(folder, "--scheme", "int4")
    result = CliRunner().invoke(app, ["model", "info", "tiny-coder-next"])
    assert re.search(r"scheme +int4\n", result.stdout)


def test_progress_in_plain_lines_says_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    text, now = StringIO(), 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.ConsoleProgress(Console(file=text, width=80)) as shown:
        shown.start("Importing x", 100_000)
        shown.update(20_000)  # what an interrupted import had done takes no time and must not count as speed
        for done in range(21_000, 100_001, 1000):
            now += 10.0
            shown.update(done)
    lines = text.getvalue().splitlines()
    assert lines[0] == "Importing x …" and lines[-1] == "Importing x: 100 %"
    assert "Importing x: 25 %, about 12 minutes left" in lines
    assert "Importing x: 75 %, about 4 minutes left" in lines
    assert 12 < len(lines) < 20  # every quarter, and every minute


def test_ctrl_c_says_that_it_can_be_continued_and_rm_frees_the_rest(folder: Path, log: Log) -> None:
    code, errors = begin(folder, stop=signal.SIGINT)
    assert code == ExitCode.CANCELLED and "Traceback" not in errors
    assert "kept; start the same import again" in errors
    assert install.remove("tiny-coder-next", log) > 10_000
    assert not any(p for p in paths.models_dir().rglob("*") if p.is_file())
