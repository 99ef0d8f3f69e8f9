"""Quantised graphs against the same dequantised weights; experts that are not routed are never read."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from test_golden_hf import GOLDEN, PROMPT, read

from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.package import WEIGHTS, Experts, Linear, LinearPart, Package, WeightsWriter, write_index
from lsp_agent.engine.quantisation import SCHEMES

MIXTURES = ["qwen2-moe", "qwen3-moe", "qwen3-moe-yarn", "qwen3-next", "qwen3-next-other"]


def dequantised(source, target):
    """A copy of a package in which every matrix is dense fp32."""
    package = Package(source)
    shutil.copytree(source, target)
    weights = {}
    with (target / WEIGHTS).open("wb") as file:
        writer = WeightsWriter(file)

        def write(array):
            extent = writer.reserve(array.shape, str(array.dtype))
            writer.write_rows(extent, 0, array)
            return extent

        def dense(part, transpose, experts=1):
            if part.format is None:
                return replace(part, values=write(package.array(part.values).astype(np.float32)))
            values = package.blocks(part, experts).dequantise()
            return LinearPart(part.rows, None, values=write(values.T if transpose else values))

        for name, weight in package.weights.items():
            if isinstance(weight, Linear):
                weights[name] = Linear(weight.columns, tuple(dense(part, True) for part in weight.parts))
            elif isinstance(weight, Experts):
                weights[name] = replace(weight, part=dense(weight.part, False, weight.count))
            elif hasattr(weight, "blocks"):
                weights[name] = replace(weight, blocks=write(package.array(weight.blocks)))
            else:
                weights[name] = write(package.array(weight))
        writer.finish()
    about = {key: value for key, value in package.header.items() if key not in ("format", "model")}
    write_index(target, package.config, about, weights)
    return target


ROUNDING = [scheme for scheme in SCHEMES if scheme != "keep"]


@pytest.mark.parametrize("scheme", ROUNDING)
@pytest.mark.parametrize("name", [*MIXTURES, "qwen3"])
def test_exact_quantised_graphs_equal_their_dequantised_weights(hf_engine, hf_package, tmp_path, name, scheme):
    dense = Engine.load(dequantised(hf_package(name, scheme), tmp_path / "dense"), threads=1, accuracy="exact")
    expected, _ = read(dense, [PROMPT])
    for pieces in ([PROMPT], [PROMPT[:13], *([token] for token in PROMPT[13:])]):
        logits, _ = read(hf_engine(name, scheme), pieces)
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("scheme", "bits", "most"), [("int4", 4, 0.11), ("int8", 8, 0.01)])
def test_the_report_says_what_rounding_costs(hf_folder, tmp_path, scheme, bits, most):
    report = import_checkpoint(hf_folder("qwen3-next"), tmp_path / "p", scheme=scheme)
    by_name = {tensor.name: tensor for tensor in report.tensors}
    experts, head, router, norm = (
        by_name[name]
        for name in ("blk.0.ffn_up_exps.weight", "output.weight", "blk.0.ffn_gate_inp.weight", "output_norm.weight")
    )
    assert (experts.bits, experts.block) == (bits, 32) and 0.001 < experts.relative_rms_error < most
    assert head.bits == router.bits == 8 and head.relative_rms_error < 0.01  # sensitive: never 4 bits
    assert norm.exact and not experts.exact


@pytest.mark.parametrize("scheme", ROUNDING)
@pytest.mark.parametrize("name", MIXTURES)
def test_fast_graphs_round_activations_only(hf_engine, name, scheme):
    expected, _ = read(hf_engine(name, scheme), [PROMPT])
    logits, _ = read(hf_engine(name, scheme, "fast"), [PROMPT])
    errors = np.linalg.norm(logits - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    # Not the mean: where rounding changes a token's experts, all is different, and random weights amplify it.
    assert 1e-6 < np.median(errors) < 0.15


def poison(package, target, layers):
    """A copy of a package with NaN in the given experts, {layer: experts}."""
    opened = Package(package)
    shutil.copytree(package, target)
    data = np.memmap(target / WEIGHTS, np.uint8, "r+")
    for layer, experts in layers.items():
        for name in ("experts_gate_up", "experts_down"):
            weight = opened.weights[f"blk.{layer}.{name}"]
            extent = weight.part.values if weight.part.format is None else weight.part.scales
            each = extent.nbytes // weight.count
            for expert in experts:
                start = extent.offset + expert * each
                data[start : start + each].view(extent.dtype)[:] = np.nan
    data.flush()
    return target


QUANTISED = [("int4", "exact"), ("int4", "fast"), ("int8", "fast")]
POISONED = [(name, "keep", "exact") for name in MIXTURES] + [
    (name, *mode) for name in ("qwen3-moe-yarn", "qwen3-next-other") for mode in QUANTISED
]


@pytest.mark.parametrize(("name", "scheme", "accuracy"), POISONED)
def test_experts_that_are_not_routed_are_never_read(hf_engine, hf_package, tmp_path, name, scheme, accuracy):
    routed = GOLDEN[f"{name}.routed"]  # of the first tokens, by transformers: [layers, tokens, experts used]
    tokens = PROMPT[: routed.shape[1]]
    config = Package(hf_package(name)).config
    sparse = [layer for layer in range(config.layers) if layer not in config.experts.dense_layers]
    healthy = hf_engine(name, scheme, accuracy)
    expected, _ = read(healthy, [tokens])
    if scheme == "keep":
        used = {layer: set(routed[index].reshape(-1).tolist()) for index, layer in enumerate(sparse)}
    else:
        used = routed_by(healthy, hf_package(name, scheme), tokens, sparse, tmp_path, accuracy)
    unused = {layer: sorted(set(range(16)) - experts) for layer, experts in used.items()}
    assert all(len(experts) >= 10 for experts in unused.values())
    folder = poison(hf_package(name, scheme), tmp_path / "unused", unused)
    logits, _ = read(Engine.load(folder, threads=1, accuracy=accuracy), [tokens])
    np.testing.assert_array_equal(logits, expected)
    for layer, experts in used.items():
        folder = poison(hf_package(name, scheme), tmp_path / f"used{layer}", {layer: [min(experts)]})
        logits, _ = read(Engine.load(folder, threads=1, accuracy=accuracy), [tokens])
        assert np.isnan(logits).any()


def routed_by(engine, package, tokens, layers, tmp_path, accuracy):
    """Which experts a quantised model uses, whose routing may differ from the reference's: those whose NaN is seen."""
    used = {layer: set() for layer in layers}
    for layer in layers:
        for expert in range(16):
            folder = poison(package, tmp_path / "probe", {layer: [expert]})
            logits, _ = read(Engine.load(folder, threads=1, accuracy=accuracy), [tokens])
            if np.isnan(logits).any():
                used[layer].add(expert)
            shutil.rmtree(folder)
    return used
