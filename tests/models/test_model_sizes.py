"""What models are said to take, in memory and on disk, is what their packages hold and what is written beside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from tiny_hf import random_weights, write_hf_checkpoint
from tiny_model import write_runnable_gguf

from lsp_agent.cli import app
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.expert_packing import PackedTensor
from lsp_agent.engine.footprint import RUNTIME_BYTES, footprint
from lsp_agent.engine.package import Experts, Package
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import store

GOLDEN = Path(__file__).parents[1] / "engine" / "golden" / "golden_hf.npz"
EXPERT_VALUES = 4 * 3 * 16 * 32 * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen3-Next checkpoint with random weights in BF16, four layers of 16 experts."""
    with np.load(GOLDEN) as golden:
        saved = json.loads(str(golden["qwen3-next.checkpoint"]))
    return write_hf_checkpoint(
        tmp_path / "tiny", saved["config"], random_weights(saved["shapes"], saved["config"]), "BF16"
    )


def run(*arguments: str | Path) -> tuple[str, str]:
    """Standard output and what a user error says."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    error = str(result.exception) if isinstance(result.exception, UserError) else ""
    assert result.exception is None or error, result.exception
    return result.stdout, error


@pytest.mark.parametrize("scheme", ["int8", "int4", "int4-64", "int4-asymmetric"])
def test_the_prepacked_file_has_the_size_that_was_said(folder: Path, scheme: str) -> None:
    said = json.loads(run("model", "import", folder, "--scheme", scheme, "--dry-run", "--json")[0])["manifest"]
    run("model", "import", folder, "--scheme", scheme)
    model = store.resolve("tiny")
    assert (model.manifest.prepacked_bytes, model.manifest.memory_bytes) == (
        said["prepacked_bytes"],
        said["memory_bytes"],
    )
    before = run("model", "info", "tiny")[0]
    assert "more for its experts once it has run on a CPU" in before and " at most" in before
    empty = store.disk_bytes(model.path)
    Engine.load(model.path, threads=1)
    (packed,) = model.path.glob("prepacked-*.bin")
    weights = json.loads(packed.with_suffix(".json").read_text())["content"]["weights"]
    content = sum(size for entry in weights.values() for _, size in PackedTensor(**entry).content)
    assert (
        0 <= content - said["prepacked_bytes"] <= 256 * 4 * 2 * 16
    )  # each expert's weights begin at an aligned address
    assert store.disk_bytes(model.path) > empty + said["prepacked_bytes"] // 2
    assert "more for its experts" not in run("model", "info", "tiny")[0]
    listed = {entry["name"]: entry for entry in json.loads(run("model", "list", "--json")[0])}
    assert listed["tiny"]["disk_bytes"] == store.disk_bytes(model.path)


@pytest.mark.parametrize(("scheme", "bits"), [("keep", 32), ("mxfp4", 8 + 2), ("int8", 8 + 2), ("int4", 4 + 2)])
def test_memory_counts_experts_as_the_cpu_holds_them(folder: Path, scheme: str, bits: int) -> None:
    run("model", "import", folder, "--scheme", scheme)
    package = Package(store.package_dir("tiny"))
    experts = footprint(weight for weight in package.weights.values() if isinstance(weight, Experts))
    assert experts.memory == RUNTIME_BYTES + EXPERT_VALUES * bits // 8
    assert bool(experts.prepacked) == (scheme in ("int8", "int4"))
    assert store.resolve("tiny").manifest.memory_bytes == footprint(package.weights.values()).memory > experts.memory


def test_a_dense_model_has_nothing_beside(tmp_path: Path) -> None:
    path = write_runnable_gguf(tmp_path / "real.gguf")
    says = run("model", "import", path, "--name", "dense", "--dry-run")[0]
    assert re.search(r"at most 0\.0 GB on disk; 0\.\d GB of memory on a CPU\.\n", says)
    made = json.loads(run("model", "import", path, "--name", "dense", "--json")[0])
    built = store.package_dir("dense")
    assert made["package_bytes"] == sum(f.stat().st_size for f in built.iterdir() if f.name != store.MANIFEST_FILE)
    assert store.resolve("dense").manifest.prepacked_bytes == 0
    assert "more for its experts" not in run("model", "info", "dense")[0]


def test_a_known_model_without_a_checksum_is_imported_not_pulled() -> None:
    with pytest.raises(UserError, match="run `lsp-agent model import PATH --name qwen3-coder-next`"):
        store.resolve("qwen3-coder-next")
    with pytest.raises(UserError, match=r"run `lsp-agent model pull qwen2\.5-coder-0\.5b`"):
        store.resolve("qwen2.5-coder-0.5b")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"--prompt-file": "x", "--tools-file": "[]"}, "--tools-file is for a chat; give --chat-file with it."),
        ({"--chat-file": "{}"}, "must hold a JSON list of"),
        ({"--chat-file": "[]"}, "must hold a JSON list of"),
        ({"--chat-file": '[{"role": "user", "content": "x"}]', "--tools-file": "{}"}, "must hold a JSON list of"),
        ({"--prompt-file": None}, "Cannot read"),
        ({"--prompt-file": b"\xff\xfe"}, "is not UTF-8 text"),
    ],
)
def test_inputs_of_generate_that_make_no_sense_get_one_sentence(
    folder: Path, tmp_path: Path, files: dict[str, str | bytes | None], says: str
) -> None:
    run("model", "import", folder)
    arguments: list[str | Path] = ["generate", "--model", "tiny"]
    for option, content in files.items():
        path = tmp_path / f"input{option}"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        arguments += [option, path]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(result.exception, UserError) and result.exception.exit_code == ExitCode.USAGE
    assert says in str(result.exception) and "\n" not in str(result.exception) and "Errno" not in str(result.exception)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [("mxfp4", "MXFP4 / 32"), ("int4", "4 bits / 32"), ("int4-asymmetric", "4 bits and zero points / 32")],
)
def test_a_report_says_which_four_bits(folder: Path, scheme: str, words: str) -> None:
    report = json.loads(run("model", "import", folder, "--scheme", scheme, "--dry-run", "--report", "--json")[0])
    assert next(entry for entry in report["report"] if entry["name"] == "experts")["carried_as"] == [words]


def test_a_damaged_package_is_mended_as_its_error_says(folder: Path) -> None:
    run("model", "import", folder)
    (store.package_dir("tiny") / "weights.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="remove it with `lsp-agent model rm` and install it again"):
        Package(store.package_dir("tiny"))
    run("model", "rm", "tiny")
    run("model", "import", folder)
    assert Package(store.package_dir("tiny")).weights
