"""`lsp-agent bench` with random weights on the CPU, and the packages of random weights that it makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lsp_agent.cli import app
from lsp_agent.engine import synthetic
from lsp_agent.engine.package import Extent, Package
from lsp_agent.engine.session import Decoder
from lsp_agent.errors import ExitCode, UserError

SMALL = ("--contexts", "40", "--prompts", "16,33", "--batch", "1,3", "--tokens", "4", "--rounds", "1", "--threads", "1")


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[str, UserError | None]:
    """Standard output, and the error for the user."""
    if monkeypatch is not None:
        monkeypatch.setitem(sys.modules, "cupy", None)
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exception is None or isinstance(result.exception, UserError), result.exception
    return result.stdout, result.exception


def test_random_weights_are_timed_and_thrown_away(tmp_path, monkeypatch):
    output, error = run(
        "--synthetic", "tiny", "--folder", str(tmp_path / "new"), "--json", *SMALL, monkeypatch=monkeypatch
    )
    assert error is None
    result = json.loads(output)
    assert (result["model"], result["layers"], result["device"], result["placement"]) == ("tiny", 4, "cpu", "cpu")
    assert result["weights"] == result["routing"] == "random" and result["scheme"] == "int4"
    assert [p["tokens"] for p in result["prefill"]] == [16, 33]
    assert [(d["context"], d["batch"]) for d in result["decode"]] == [(40, 1), (40, 3)]
    for step in result["decode"]:
        assert step["finite"] and step["hits"] is None and 0 < step["best_ms"] <= step["ms"]
        assert step["tokens_s"] == pytest.approx(1000 * step["batch"] / step["ms"])
    assert result["machine"]["host"] > 1e8 and result["machine"]["measured"]
    (a_token,) = result["a_token"]
    assert a_token["gpu_bytes"] == 0 and 1e5 < a_token["host_bytes"] < 1e7
    assert not list((tmp_path / "new").iterdir())


def test_the_table_names_each_run(monkeypatch):
    output, error = run("--synthetic", "tiny", "--layers", "2", "--placement", "cpu", *SMALL, monkeypatch=monkeypatch)
    assert error is None and "tiny, int4, 2 layers, cpu on CPU; weights: random; routing: random." in output
    for row in ("prompt of 16", "prompt of 33", "decode at 40, batch 1", "decode at 40, batch 3"):
        assert row in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--synthetic", "nothing"], "There is no model called 'nothing'"),
        (["--model", "x", "--layers", "2"], "--layers and --scheme are for random weights; leave --model out."),
        (["--synthetic", "tiny", "--contexts", "8k"], "tiny has a context of 4096 tokens; ask for shorter --contexts."),
        (["--synthetic", "tiny", "--contexts", "none"], "'none' is not a number of tokens"),
        (["--synthetic", "tiny", "--batch", "1,9"], "'1,9' is no list of numbers from 1 to 8, such as 1,4."),
        (["--synthetic", "tiny", "--vram", "big"], "'big' is not a size"),
    ],
)
def test_wrong_arguments_get_a_sentence(monkeypatch, arguments, sentence):
    _, error = run(*arguments, monkeypatch=monkeypatch)
    assert error and error.exit_code == ExitCode.USAGE and sentence in str(error)


def test_a_placement_without_a_gpu_and_a_trace_on_the_cpu_are_refused(monkeypatch):
    _, error = run("--synthetic", "tiny", "--placement", "hybrid", monkeypatch=monkeypatch)
    assert error and "needs the GPU packages" in str(error)
    _, error = run("--synthetic", "tiny", "--trace", *SMALL, monkeypatch=monkeypatch)
    assert error and "steers the GPU's decode kernels" in str(error)
    _, error = run("--synthetic", "qwen2.5-coder-0.5b", "--layers", "1", "--trace", *SMALL, monkeypatch=monkeypatch)
    assert error and "no experts to route; leave --trace out." in str(error)


@pytest.mark.parametrize("scheme", ["int4", "mxfp4", "int4-asymmetric"])
def test_synthetic_packages_run_and_hold_what_their_layout_says(tmp_path, scheme):
    package = Package(synthetic.make(tmp_path / "p", synthetic.TINY, scheme))
    planned = synthetic.layout(synthetic.TINY, scheme)
    assert package.weights.keys() == planned.weights.keys() and package.header["scheme"] == scheme
    assert synthetic.is_synthetic(package.header)
    decoder = Decoder(package, 1, 64, "fast")
    state = decoder.new_state(64)
    logits = decoder.run(np.arange(12)[None], state, range(12))
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 30
    assert len(set(logits.argmax(1).tolist())) > 1, "tokens differ"


def test_layers_share_their_bytes_on_disk_only(tmp_path):
    package = Package(synthetic.make(tmp_path / "p", synthetic.TINY, "int4"))
    one, other = (package.weights[f"blk.{index}.experts_down"].part.codes for index in (0, 1))
    assert isinstance(one, Extent) and one == other
    planned = synthetic.layout(synthetic.TINY, "int4").weights
    assert planned["blk.0.experts_down"].part.codes != planned["blk.1.experts_down"].part.codes
    again = Package(synthetic.make(tmp_path / "again", synthetic.TINY, "int4"))
    assert np.array_equal(again.array(one), package.array(one))


def test_fewer_layers_keep_their_kinds():
    config = synthetic.with_layers(synthetic.TINY, 2)
    assert config.layers == 2 and config.linear_attention and config.linear_attention.layers == (0, 1)
    assert synthetic.with_layers(synthetic.TINY, None) is synthetic.TINY
    assert synthetic.with_layers(synthetic.TINY, 9).layers == 4


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    usage = synthetic.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"takes 0\.0 GB and .* has 0\.0 GB free; set TMPDIR"):
        synthetic.make(tmp_path / "p", synthetic.TINY, "int4")


def test_a_benchmark_goes_back_to_the_context_for_each_batch(tmp_path):
    from lsp_agent.engine.benchmark import Benchmark

    decoder = Decoder(Package(synthetic.make(Path(tmp_path) / "p", synthetic.TINY, "int4")), 1, 64, "fast")
    runs = Benchmark(decoder, 64, None)
    assert [runs.decode(20, batch, 3).batch for batch in (1, 2, 1)] == [1, 2, 1]
    assert runs.decode(30, 1, 3).context == 30


def test_the_share_found_in_slots_is_that_of_the_timed_steps(tmp_path, monkeypatch):
    from lsp_agent.engine import benchmark

    decoder = Decoder(Package(synthetic.make(Path(tmp_path) / "p", synthetic.TINY, "int4")), 1, 64, "fast")
    counts = iter([(100, 200), (103, 204)])
    monkeypatch.setattr(decoder, "expert_hits", lambda: next(counts))
    assert benchmark.Benchmark(decoder, 64, None).decode(20, 1, 4).hits == 0.75
