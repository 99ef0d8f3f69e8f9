"""Which model is the default and why: `lsp_agent.models.select`, `lsp-agent doctor` and `lsp-agent model`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_model import Hub, tiny_manifest

from lsp_agent import machine
from lsp_agent.cli import app
from lsp_agent.commands import doctor
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import install, select, store
from lsp_agent.models.manifest import InstalledModel, find

GB = 1_000_000_000


def model(name: str, **changes: object) -> InstalledModel:
    return InstalledModel(name, Path(name), tiny_manifest(name=name).model_copy(update=changes))


SMALL = model("small", tier="small", parameters=1 * GB, memory_bytes=2 * GB)
BIGGER = model("bigger", tier="small", parameters=3 * GB, memory_bytes=4 * GB)
LARGE = model("large", tier="large", parameters=30 * GB, memory_bytes=20 * GB)
ALIEN = model("alien", tier="large", parameters=80 * GB, memory_bytes=1 * GB, architecture="mamba")


@pytest.mark.parametrize(
    ("gigabytes", "expected"), [(64, "large"), (20, "large"), (19, "bigger"), (3, "small"), (1, None)]
)
def test_the_most_capable_that_fits(gigabytes: int, expected: str | None) -> None:
    choice = select.choose([SMALL, LARGE, BIGGER, ALIEN], gigabytes * GB)
    assert (choice.model.name if choice.model else None) == expected
    assert [c.name for c in choice.candidates if c.chosen] == ([expected] if expected else [])
    assert [c.name for c in choice.candidates] == ["alien", "large", "bigger", "small"]
    assert "cannot run the mamba architecture" in choice.candidates[0].reason


def test_reasons_say_what_each_needs() -> None:
    choice = select.choose([SMALL, BIGGER, LARGE], 5 * GB)
    reasons = {c.name: c.reason for c in choice.candidates}
    assert reasons["large"] == "needs 20.0 GB of the 5.0 GB of memory available"
    assert reasons["bigger"].startswith("the most capable installed model that fits")
    assert reasons["small"] == "fits, but bigger is more capable"


def test_advice_names_the_model_to_pull() -> None:
    assert select.choose([], 8 * GB).advice == "No model is installed; run `lsp-agent model pull qwen2.5-coder-1.5b`."
    assert select.choose([], 2 * GB).advice == "No model is installed; run `lsp-agent model pull qwen2.5-coder-0.5b`."
    assert "No installed model fits" in select.choose([LARGE], 8 * GB).advice
    assert "close other programs" in select.choose([], GB // 10).advice


def test_memory_stays_within_the_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    unlimited = machine.usable_memory()
    assert unlimited > 0
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(machine.usable_memory() - unlimited) < GB
    (tmp_path / "memory.max").write_text("5000\n")
    assert machine.usable_memory() == 4000


def put(name: str) -> None:
    """Install the shipped model `name` without its weights, which nothing here loads."""
    folder = store.package_dir(name)
    folder.mkdir(parents=True)
    (folder / store.MANIFEST_FILE).write_text(find(name).model_dump_json())


def test_resolve_gives_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"model pull qwen2\.5-coder"):
        store.resolve(None)
    put("qwen2.5-coder-0.5b")
    put("qwen2.5-coder-1.5b")
    monkeypatch.setattr(machine, "usable_memory", lambda: 8 * GB)
    assert store.resolve(None).name == "qwen2.5-coder-1.5b"
    assert store.resolve("qwen2.5-coder-0.5b").path == store.package_dir("qwen2.5-coder-0.5b")
    monkeypatch.setattr(machine, "usable_memory", lambda: 2 * GB)
    assert store.resolve(None).name == "qwen2.5-coder-0.5b"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, standalone_mode=False)


def test_doctor_without_a_model_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_memory", lambda: 8 * GB)
    result = run("doctor")
    assert result.return_value == ExitCode.ENVIRONMENT
    assert "run `lsp-agent model pull qwen2.5-coder-1.5b`" in result.output
    report = json.loads(run("doctor", "--json").output)
    assert report["usable"] is False
    assert report["model"] is None


def test_doctor_reports_the_machine_and_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    put("qwen2.5-coder-0.5b")
    put("qwen2.5-coder-1.5b")
    monkeypatch.setattr(machine, "usable_memory", lambda: 2 * GB)
    result = run("doctor", "--json")
    assert result.return_value == ExitCode.OK
    report = json.loads(result.output)
    assert report["usable"] is True
    assert report["model"] == "qwen2.5-coder-0.5b"
    assert [(m["name"], m["chosen"], m["fits"]) for m in report["models"]] == [
        ("qwen2.5-coder-1.5b", False, False),
        ("qwen2.5-coder-0.5b", True, True),
    ]
    assert "CPUExecutionProvider" in report["onnxruntime"]["providers"]
    assert report["machine"]["cores"] >= 1
    assert report["machine"]["disk_free_bytes"] > 0
    assert report["git"].startswith("git version")
    assert report["folders"]["cache"]["writable"] is True
    text = run("doctor").output
    assert "qwen2.5-coder-0.5b" in text
    assert report["sandbox"]["detail"].split()[0] in text


def test_doctor_without_onnxruntime_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    put("qwen2.5-coder-0.5b")
    monkeypatch.setattr(machine, "usable_memory", lambda: 8 * GB)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("doctor")
    assert result.return_value == ExitCode.ENVIRONMENT
    assert "pip install 'lsp-agent[cpu]'" in result.output


def test_a_gpu_counts_only_when_its_driver_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(doctor, "_nvidia_gpu", lambda: None)
    assert doctor.examine()["onnxruntime"]["gpu"] is None
    monkeypatch.setattr(doctor, "_nvidia_gpu", lambda: "Some GPU, 80 GB")
    assert doctor.examine()["onnxruntime"]["gpu"] == "Some GPU, 80 GB"


@pytest.mark.parametrize(("device", "says"), [("nonsense", "There is no device 'nonsense'"), ("cuda", "[gpu]")])
def test_doctor_says_that_the_device_cannot_be_used(device: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put("qwen2.5-coder-0.5b")
    monkeypatch.setattr(machine, "usable_memory", lambda: 8 * GB)
    monkeypatch.setitem(sys.modules, "cupy", None)
    report = json.loads(run("doctor", "--json").output)
    assert report["device"] == "cpu" and "pip install 'lsp-agent[gpu]'" in report["device_reason"]
    assert "'lsp-agent[gpu]')" in " ".join(run("doctor").output.split())
    monkeypatch.setenv("LSP_AGENT_DEVICE", device)
    result = run("doctor")
    assert result.return_value == ExitCode.ENVIRONMENT
    assert says in result.output


def test_list_and_info(monkeypatch: pytest.MonkeyPatch) -> None:
    put("qwen2.5-coder-0.5b")
    monkeypatch.setattr(machine, "usable_memory", lambda: 8 * GB)
    states = {m["name"]: m["state"] for m in json.loads(run("model", "list", "--json").output)}
    assert states == {
        "qwen2.5-coder-0.5b": "default",
        "qwen2.5-coder-1.5b": "available",
        "qwen3-coder-30b-a3b": "importable",
        "qwen3-coder-next": "importable",
    }
    table = run("model", "list").output
    assert all(name in table for name in states)
    text = run("model", "info", "qwen3-coder-next").output
    assert "not known" in text
    info = json.loads(run("model", "info", "qwen2.5-coder-0.5b", "--json").output)
    assert info["path"] == str(store.package_dir("qwen2.5-coder-0.5b"))
    result = run("model", "info", "qwen2.5-coder-0.5")
    assert isinstance(result.exception, UserError)
    assert "did you mean qwen2.5-coder-0.5b?" in str(result.exception)


def test_pull_and_rm_from_the_command_line(tiny: object, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def importer(source: Path, package: Path, *, scheme: object, on_progress: object) -> None:
        package.mkdir()
        (package / "weights.bin").write_bytes(source.read_bytes())

    monkeypatch.setattr(install, "_importer", lambda: importer)
    result = run("model", "pull", "tiny")
    assert "Installed tiny in" in result.output
    assert "licence MIT" in result.output
    assert "Downloading tiny: 100 %" in result.output
    assert "installed already" in run("model", "pull", "tiny").output
    assert "Removed tiny" in run("model", "rm", "tiny").output
    assert store.installed() == []
