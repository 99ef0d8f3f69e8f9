"""Memory plans for a GPU: sums of what the package holds, and sentences that say what would fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_hf import random_weights, write_hf_checkpoint

from lsp_agent.cli import app
from lsp_agent.engine.architecture import ExpertsConfig, LinearAttentionConfig, ModelConfig
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.plan import RUNTIME_BYTES, WORKSPACE_BYTES, make_plan, state_bytes
from lsp_agent.errors import ExitCode, UserError

NEXT = ModelConfig(
    architecture="qwen3next", layers=48, hidden=2048, heads=16, kv_heads=2, head_size=256, intermediate=5120,
    vocabulary=151936, context=262144, rope_base=1e7, rms_epsilon=1e-6, rotary=64,
    experts=ExpertsConfig(512, 10, 512, 512, normalise=True),
    linear_attention=LinearAttentionConfig(16, 32, 128, 128, 4, tuple(i for i in range(48) if (i + 1) % 4)),
)  # fmt: skip


def test_the_states_of_the_large_model_are_what_its_numbers_say() -> None:
    token, fixed = state_bytes(NEXT)
    assert token == 12 * 2 * 2 * 256 * 2 == 24_576
    assert fixed == 36 * (4 * 32 * 128 * 128 + 3 * 8192 * 2)


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> Path:
    with np.load(Path(__file__).parents[1] / "engine" / "golden" / "golden_hf.npz") as golden:
        saved = json.loads(str(golden["qwen3-next.checkpoint"]))
    source = folder / "Tiny-Coder-Next"
    write_hf_checkpoint(source, saved["config"], random_weights(saved["shapes"], saved["config"]))
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(folder / "cache"))
    result = CliRunner().invoke(app, ["model", "import", str(source), "--scheme", scheme], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "cache" / "models" / "tiny-coder-next"


def run(*arguments: str, name: str = "tiny-coder-next") -> tuple[str, UserError | None]:
    """Standard output, and the error for the user."""
    result = CliRunner().invoke(app, ["model", "plan", name, *arguments])
    assert result.exception is None or isinstance(result.exception, UserError), result.exception
    return result.stdout, result.exception


@pytest.mark.parametrize("scheme", ["int4", "int4-asymmetric"])
def test_a_plan_counts_every_byte_of_the_package_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    from lsp_agent.engine.package import Experts, Linear, Package, Rows

    package = Package(installed(tmp_path, monkeypatch, scheme))
    expected = scales = 0
    for weight in package.weights.values():
        parts = weight.parts if isinstance(weight, Linear) else [weight.part] if isinstance(weight, Experts) else []
        extents = [e for part in parts for e in part.extents().values()]
        if not isinstance(weight, Rows | Linear | Experts):
            extents = [weight]
        expected += sum(int(np.prod(e.shape)) * (1 if e.dtype == "uint8" else 2) for e in extents)
        if isinstance(weight, Experts) and weight.part.scales:
            scales += 4 * int(np.prod(weight.part.scales.shape)) * (scheme == "int4-asymmetric")
    plan = make_plan(package, 128)
    by_name = {item.what: item.bytes for item in plan.items}
    weights = [size for what, size in by_name.items() if "dense" in what or "a layer" in what or "matrix" in what]
    assert sum(weights) == expected
    assert by_name.get("experts' scales for prompts", 0) == scales
    elsewhere = {item.what: item for item in make_plan(package, 128, Placement("host")).items}
    (every,) = (item for item in elsewhere.values() if item.where == "pinned" and item.blocks)
    fetched = elsewhere["experts of a layer for prompts"].bytes
    assert fetched == every.bytes // len(every.blocks) if scheme == "int4" else 0 < fetched < every.bytes
    token, once = state_bytes(package.config)
    assert by_name["keys and values"] == 128 * token and by_name["recurrent states, a ring"] == 9 * once
    assert by_name["the same of 3 earlier prompts"] == 3 * (128 * token + once)
    more = {item.what: item.bytes for item in make_plan(package, 128, batch=4).items}
    assert more["states of 4 answers at once"] == 4 * (128 * token + 2 * once)


def test_a_layout_is_what_an_import_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lsp_agent.engine.package import Package
    from lsp_agent.engine.synthetic import layout

    for scheme in ("mxfp4", "int4"):
        package = Package(installed(tmp_path / scheme, monkeypatch, scheme))
        planned = layout(package.config, scheme)
        assert planned.weights.keys() == package.weights.keys()
        ours, theirs = make_plan(planned, 256), make_plan(package, 256)
        sizes = [{i.what: i.bytes for i in plan.items if i.what != "embedding"} for plan in (ours, theirs)]
        assert sizes[0] == sizes[1]


def test_the_command_plans_for_a_card_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, "int4")
    output, error = run("--vram", "24GiB", "--context", "1k", "--json")
    plan = json.loads(output)
    assert error is None and plan["fits"] and plan["context"] == 256, "the context is the model's at most"
    assert plan["placement"] == "resident" and plan["model"] == "tiny-coder-next" and plan["scheme"] == "int4"
    assert RUNTIME_BYTES + WORKSPACE_BYTES < plan["needed"] < 4e9 and plan["free"] == 24 * 1024**3
    assert sum(i["bytes"] for i in plan["items"] if i["where"] == "gpu") == plan["needed"]
    assert not plan["speed"]["machine"]["measured"] and plan["speed"]["decode"] > 0
    text, _ = run("--vram", "24GiB")
    assert "GPU memory" in text and "it fits, with up to 256" in text and "page-locked main memory" in text
    assert "Speed (an estimate)" in text and "assumed" in text and "Placement: resident." in text
    _, error = run("--vram", "1GiB")
    assert error and error.exit_code == ExitCode.ENVIRONMENT and "use the CPU or a smaller model" in str(error)
    monkeypatch.setitem(sys.modules, "cupy", None)
    _, error = run()
    assert error and "--vram 24GiB" in str(error)


def test_a_known_model_is_planned_before_it_is_installed() -> None:
    output, error = run("--vram", "24GiB", "--ram", "64GB", "--context", "64k", "--json", name="qwen3-coder-next")
    plan = json.loads(output)
    assert error is None and plan["scheme"] == "int4-64" and plan["placement"] == "hybrid"
    assert 20 <= plan["slots"] < 512 and plan["needed"] <= plan["free"] and 40e9 < plan["pinned"] < 45e9
    blocks = plan["blocks"]
    assert len(blocks) == 48 and [b["kind"] for b in blocks[:4]] == ["Gated DeltaNet"] * 3 + ["attention"]
    shared = [i for i in plan["items"] if i["blocks"]]
    for where in ("gpu", "pinned"):
        total = sum(sum(block[where].values()) for block in blocks)
        assert abs(total - sum(i["bytes"] for i in shared if i["where"] == where)) < 48 * len(shared)
    assert "keys and values" in blocks[3]["gpu"] and "keys and values" not in blocks[0]["gpu"]
    int4 = json.loads(run("--vram", "80GiB", "--scheme", "int4-64", "--json", name="qwen3-coder-next")[0])
    assert int4["scheme"] == "int4-64" and int4["placement"] == "resident"
    text, error = run("--vram", "5GiB", name="qwen3-coder-next")
    assert error and "even with all experts in main memory" in str(error) and "tokens/s" in text


def test_a_placement_can_be_asked_for() -> None:
    arguments = ("--vram", "80GiB", "--ram", "64GB", "--json")
    plan = json.loads(run(*arguments, "--placement", "host", name="qwen3-coder-next")[0])
    assert plan["placement"] == "host" and plan["chunk"] == 8192 and plan["needed"] < 16e9
    output, error = run("--vram", "24GiB", "--placement", "resident", name="qwen3-coder-next")
    assert not output and error and "qwen3-coder-next needs 4" in str(error)
    output, error = run(*arguments, "--placement", "cpu", name="qwen3-coder-next")
    assert error is None and json.loads(output)["placement"] == "cpu"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--vram", "much"], "'much' is not a size; write it like 24GiB"),
        (["--context", "0"], "'0' is not a number of tokens"),
        (["--context", "64m"], "'64m' is not a number of tokens"),
        (["--ram", "some"], "'some' is not a size"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments: list[str], sentence: str) -> None:
    _, error = run(*arguments)
    assert error and error.exit_code == ExitCode.USAGE and sentence in str(error)
