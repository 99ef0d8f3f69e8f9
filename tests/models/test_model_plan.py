"""Memory plans for a GPU: sums of what the package holds, and sentences that say what would fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lsp_agent.cli import app
from lsp_agent.engine.architecture import ExpertsConfig, LinearAttentionConfig, ModelConfig
from lsp_agent.engine.plan import RUNTIME_BYTES, WORKSPACE_BYTES, make_plan, state_bytes
from lsp_agent.engine.state import PREFIX_SLOTS
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
    assert fixed == 2 * 36 * (4 * 32 * 128 * 128 + 3 * 8192 * 2)


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, scheme: str) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1] / "engine" / "golden"))
    from tiny_hf import random_weights, write_hf_checkpoint

    with np.load(Path(__file__).parents[1] / "engine" / "golden" / "golden_hf.npz") as golden:
        saved = json.loads(str(golden["qwen3-next.checkpoint"]))
    source = folder / "Tiny-Coder-Next"
    write_hf_checkpoint(source, saved["config"], random_weights(saved["shapes"], saved["config"]))
    monkeypatch.setenv("LSP_AGENT_CACHE_DIR", str(folder / "cache"))
    result = CliRunner().invoke(app, ["model", "import", str(source), "--scheme", scheme], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder / "cache" / "models" / "tiny-coder-next"


def run(*arguments: str) -> tuple[str, UserError | None]:
    """Standard output, and the error for the user."""
    result = CliRunner().invoke(app, ["model", "plan", "tiny-coder-next", *arguments])
    assert result.exception is None or isinstance(result.exception, UserError), result.exception
    return result.stdout, result.exception


def test_a_plan_counts_every_byte_of_the_package_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lsp_agent.engine.package import Experts, Linear, Package, Rows

    package = Package(installed(tmp_path, monkeypatch, "int4"))
    expected = 0
    for weight in package.weights.values():
        parts = weight.parts if isinstance(weight, Linear) else [weight.part] if isinstance(weight, Experts) else []
        extents = [e for part in parts for e in part.extents().values()]
        if not isinstance(weight, Rows | Linear | Experts):
            extents = [weight]
        expected += sum(int(np.prod(e.shape)) * (1 if e.dtype == "uint8" else 2) for e in extents)
    plan = make_plan(package, 128)
    weights = [item for item in plan.items if not item.what.startswith(("cache", "work", "embedding"))]
    assert sum(item.bytes for item in weights) == expected
    token, fixed = state_bytes(package.config)
    assert [i.bytes for i in plan.items if "prompts" in i.what] == [PREFIX_SLOTS * (128 * token + fixed)]


def test_the_scales_of_mxfp4_count_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lsp_agent.engine.package import Experts, Package

    package = Package(installed(tmp_path, monkeypatch, "mxfp4"))
    experts = [weight.part for weight in package.weights.values() if isinstance(weight, Experts)]
    expected = sum(part.codes.nbytes + 3 * part.scales.nbytes for part in experts if part.codes and part.scales)
    assert {item.what: item.bytes for item in make_plan(package, 64).items}["experts"] == expected > 0


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lsp_agent.engine.package import Package

    plan = make_plan(Package(installed(tmp_path, monkeypatch, "int8")), 65536)
    plan.check(plan.needed, "tiny")
    for free in (plan.needed - 1, plan.needed - 30_000 * plan.bytes_a_token):
        longest = plan.longest_context(free)
        assert 0 < longest < 65536 and longest % 1024 == 0
        with pytest.raises(UserError, match=f"choose a context of at most {longest}"):
            plan.check(free, "tiny")
        shorter = make_plan(Package(tmp_path / "cache" / "models" / "tiny-coder-next"), longest)
        assert shorter.needed <= free < shorter.needed + 1024 * shorter.bytes_a_token
    with pytest.raises(UserError, match="use the CPU or a smaller model"):
        plan.check(1_000_000, "tiny")


def test_the_command_plans_for_a_card_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, "int4")
    output, error = run("--vram", "24GiB", "--context", "1k", "--json")
    plan = json.loads(output)
    assert error is None and plan["fits"] and plan["context"] == 256, "the context is the model's at most"
    assert RUNTIME_BYTES + WORKSPACE_BYTES < plan["needed"] < 4e9 and plan["free"] == 24 * 1024**3
    text, _ = run("--vram", "24GiB")
    assert "GPU memory" in text and "it fits, with up to 256" in text and "file pages" in text
    _, error = run("--vram", "1GiB")
    assert error and error.exit_code == ExitCode.ENVIRONMENT and "use the CPU or a smaller model" in str(error)
    monkeypatch.setitem(sys.modules, "cupy", None)
    _, error = run()
    assert error and "--vram 24GiB" in str(error)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--vram", "much"], "'much' is not a size; write it like 24GiB"),
        (["--context", "0"], "'0' is not a number of tokens"),
        (["--context", "64m"], "'64m' is not a number of tokens"),
    ],
)
def test_wrong_arguments_get_a_sentence(arguments: list[str], sentence: str) -> None:
    _, error = run(*arguments)
    assert error and error.exit_code == ExitCode.USAGE and sentence in str(error)
