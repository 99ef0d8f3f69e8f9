"""Which format each scheme gives a matrix, and what an import makes of it."""

import json

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from test_gguf_mixtures import convert
from test_golden_hf import GOLDEN as GOLDEN_HF
from test_golden_hf import PROMPT, read
from test_quantised_graphs import dequantised
from tiny_hf import random_weights, write_hf_checkpoint

from lsp_agent.engine.blocks import E2M1
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.package import Experts, Linear, Package
from lsp_agent.engine.quantisation import EIGHT, HALF_FOUR, HALF_FOUR_ASYMMETRIC, MXFP4, SCHEMES
from lsp_agent.engine.rounding import quantise
from lsp_agent.errors import UserError


def test_blocks_shrink_to_fit_the_columns():
    wide = SCHEMES["int4-128"]
    assert [wide.format_of(Type.BF16, columns, False).block for columns in (256, 192, 96, 48)] == [128, 64, 32, 16]
    assert wide.format_of(Type.BF16, 40, False) is None
    assert wide.experts_format({Type.BF16}, {2048, 1408 - 64}).block == 64  # one size for both projections
    assert SCHEMES["mxfp4"].experts_format({Type.BF16}, {2048, 48}) is None  # MXFP4 knows blocks of 32 only


def test_quantised_matrices_are_carried_whatever_the_scheme():
    for scheme in SCHEMES.values():
        for kind, bits, block in ((Type.Q4_K, 4, 32), (Type.Q6_K, 8, 16), (Type.Q8_0, 8, 32)):
            form = scheme.format_of(kind, 512, sensitive=False)
            assert (form.bits, form.block) == (bits, block)
        assert scheme.experts_format({Type.Q4_0}, {512}) == HALF_FOUR
        assert scheme.experts_format({Type.Q4_0, Type.Q8_0}, {512}) == EIGHT


def test_experts_of_k_quants_get_4_bits_only_if_asked():
    formats = {name: scheme.experts_format({Type.Q4_K, Type.Q6_K}, {512}) for name, scheme in SCHEMES.items()}
    assert formats.pop("keep") == formats.pop("int8") == EIGHT
    assert formats.pop("mxfp4") == MXFP4
    assert set(formats.values()) == {HALF_FOUR_ASYMMETRIC}


def parts(package):
    for weight in package.weights.values():
        if isinstance(weight, Linear):
            yield from weight.parts
        elif isinstance(weight, Experts):
            yield weight.part


@pytest.mark.parametrize(("scheme", "dtype"), [("keep", "float32"), ("int4", "float16")])
def test_what_stays_floating_point_takes_16_bits_where_the_scheme_rounds(hf_package, scheme, dtype):
    package = Package(hf_package("qwen3-next", scheme))
    embedding = package.weights["token_embd"]
    assert embedding.type == {"float32": "F32", "float16": "F16"}[dtype]
    dense = [part.values.dtype for part in parts(package) if part.format is None]
    assert set(dense) <= {dtype} and (scheme != "keep" or dense)
    assert package.weights["output_norm"].dtype == "float32"  # vectors always


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_16_bit_checkpoints_are_kept_in_16_bits_exactly(hf_folder, tmp_path, name):
    import_checkpoint(hf_folder(name, "BF16"), tmp_path / "p")
    package = Package(tmp_path / "p")
    assert {part.values.dtype for part in parts(package)} == {"float16"}
    head = package.weights["output"].parts[0]
    values = package.array(head.values).astype(np.float32)
    # The weights, by construction, are normal numbers of fp16, so that nothing of BF16 is lost.
    assert np.array_equal(values, values.astype(ml_dtypes.bfloat16).astype(np.float32)) and np.abs(values).max() > 0


@pytest.mark.parametrize("name", ["qwen3", "qwen3-next"])
def test_16_bit_graphs_equal_the_same_values_in_32(hf_folder, tmp_path, name):
    import_checkpoint(hf_folder(name, "F16"), tmp_path / "half")
    half, _ = read(Engine.load(tmp_path / "half", threads=1, accuracy="exact"), [PROMPT])
    wide = dequantised(tmp_path / "half", tmp_path / "wide")
    assert {part.values.dtype for part in parts(Package(wide))} == {"float32"}
    full, _ = read(Engine.load(wide, threads=1, accuracy="exact"), [PROMPT])
    assert np.abs(half - full).max() < 1e-5 * np.abs(full).max()


def test_values_beyond_16_bits_are_refused_where_they_are_wanted(tmp_path):
    saved = json.loads(str(GOLDEN_HF["qwen3.checkpoint"]))
    weights = random_weights(saved["shapes"], saved["config"])
    weights["model.embed_tokens.weight"][3, 3] = 1e6
    folder = write_hf_checkpoint(tmp_path / "spoilt", saved["config"], weights)
    with pytest.raises(UserError, match=r"token_embd.weight has values beyond 65504"):
        import_checkpoint(folder, tmp_path / "p", scheme="int4")
    import_checkpoint(folder, tmp_path / "p", scheme="keep")


@pytest.mark.parametrize("scheme", ["int4", "int4-asymmetric", "mxfp4"])
def test_experts_refitted_to_4_bits_run_as_what_they_stand_for(hf_folder, tmp_path, scheme):
    source = convert(hf_folder("qwen3-next"), tmp_path / "x.gguf", {"exps": Type.Q4_1})
    report = import_checkpoint(source, tmp_path / "p", scheme=scheme)
    form = MXFP4 if scheme == "mxfp4" else HALF_FOUR_ASYMMETRIC
    assert Package(tmp_path / "p").weights["blk.0.experts_down"].part.format == form
    (error,) = {t.relative_rms_error for t in report.tensors if t.name == "blk.0.ffn_down_exps.weight"}
    assert 0.02 < error < (0.14 if scheme == "mxfp4" else 0.09)
    dense = Engine.load(dequantised(tmp_path / "p", tmp_path / "dense"), threads=1, accuracy="exact")
    expected, _ = read(dense, [PROMPT])
    exact, _ = read(Engine.load(tmp_path / "p", threads=1, accuracy="exact"), [PROMPT])
    assert np.abs(exact - expected).max() < 1e-4 * np.abs(expected).max()
    fast, _ = read(Engine.load(tmp_path / "p", threads=1, accuracy="fast"), [PROMPT])
    errors = np.linalg.norm(fast - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert 1e-6 < np.median(errors) < 0.15


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-next"])
def test_mxfp4_experts_lie_column_by_column(hf_package, name):
    kept, package = Package(hf_package(name)), Package(hf_package(name, "mxfp4"))
    for projection in ("experts_gate_up", "experts_down"):
        dense, weight = (p.weights[f"blk.1.{projection}"] for p in (kept, package))
        values = kept.array(dense.part.values)
        expected = quantise(values, MXFP4)
        np.testing.assert_array_equal(package.blocks(weight.part, weight.count).dequantise(), expected.dequantise())
        rows = weight.part.rows // weight.count
        stored = package.array(weight.part.codes).reshape(weight.count, weight.columns, rows // 2)
        scales = package.array(weight.part.scales).reshape(weight.count, rows, weight.columns // 32)
        values = values.reshape(weight.count, rows, weight.columns)
        for expert, row, column in np.random.default_rng(0).integers(0, (weight.count, rows, weight.columns), (50, 3)):
            byte = stored[expert, column, row // 2]
            code = byte >> 4 if row % 2 else byte & 15
            scale = 2.0 ** (int(scales[expert, row, column // 32]) - 127)
            assert abs(E2M1[code] * scale - values[expert, row, column]) <= scale  # half the widest step, 4 to 6
            assert E2M1[code] * scale == expected.dequantise().reshape(values.shape)[expert, row, column]


@pytest.mark.parametrize("scheme", ["keep", "int8", "int4", "mxfp4"])
@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.experts.3.up_proj", "input_layernorm"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_values_that_are_no_finite_numbers_are_refused(tmp_path, scheme, part, value):
    saved = json.loads(str(GOLDEN_HF["qwen3-moe.checkpoint"]))
    weights = random_weights(saved["shapes"], saved["config"])
    weights[f"model.layers.1.{part}.weight"].reshape(-1)[5] = value
    folder = write_hf_checkpoint(tmp_path / "c", saved["config"], weights)
    with pytest.raises(UserError, match=r"Tensor blk\.1\..* no finite numbers; download"):
        import_checkpoint(folder, tmp_path / "p", scheme=scheme)
    assert not (tmp_path / "p").exists()
