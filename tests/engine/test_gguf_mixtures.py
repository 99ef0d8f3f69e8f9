"""GGUF files of the new architectures hold the same model as the Hugging Face folders they were converted from."""

import re
from dataclasses import replace

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants
from test_golden_hf import PROMPT, read
from test_quantised_graphs import dequantised
from tiny_checkpoint import add_vocabulary

from lsp_agent.engine.checkpoints.checkpoint import open_checkpoint
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.package import Package

NAMES = ["qwen3", "qwen2-moe", "qwen3-moe", "qwen3-next"]


def convert(folder, path, kinds=None):
    """Write a Hugging Face folder as GGUF, as llama.cpp's converter does. `kinds`: type by part of a tensor's name."""
    checkpoint = open_checkpoint(folder)
    config, name = checkpoint.config(), checkpoint.architecture
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.intermediate)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_rope_dimension_count(config.rotary_size)
    writer.add_layer_norm_rms_eps(config.rms_epsilon)  # in fp32
    if config.experts:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.experts.used)
        writer.add_expert_feed_forward_length(config.experts.intermediate)
        writer.add_expert_shared_feed_forward_length(config.experts.shared_intermediate)
    if linear := config.linear_attention:
        writer.add_ssm_conv_kernel(linear.kernel)
        writer.add_ssm_inner_size(linear.value_heads * linear.value_size)
        writer.add_ssm_state_size(linear.key_size)
        writer.add_ssm_time_step_rank(linear.value_heads)
        writer.add_ssm_group_count(linear.key_heads)
    add_vocabulary(writer)
    for tensor in checkpoint.tensors.values():
        raw = np.ascontiguousarray(tensor.read(0, tensor.rows))
        values = quants.dequantize(raw, tensor.type).reshape(tensor.rows, tensor.columns)
        kind = next((kind for part, kind in (kinds or {}).items() if part in tensor.name), Type.F32)
        if kind != Type.F32:
            raw = quants.quantize(values, kind)
            shape = (config.experts.count, -1, raw.shape[-1]) if "exps" in tensor.name else raw.shape
            writer.add_tensor(tensor.name, raw.reshape(shape), raw_dtype=kind)
        elif "exps" in tensor.name:
            writer.add_tensor(tensor.name, values.reshape(config.experts.count, -1, tensor.columns))
        else:
            writer.add_tensor(tensor.name, values.reshape(-1) if tensor.rows == 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", NAMES)
def test_gguf_and_hugging_face_make_the_same_package(hf_folder, hf_package, tmp_path, name):
    import_checkpoint(convert(hf_folder(name), tmp_path / "x.gguf"), tmp_path / "p")
    ours, theirs = Package(tmp_path / "p"), Package(hf_package(name))
    assert replace(ours.config, rms_epsilon=theirs.config.rms_epsilon) == theirs.config
    assert ours.config.rms_epsilon == np.float32(theirs.config.rms_epsilon)
    assert ours.weights == theirs.weights
    assert (tmp_path / "p" / "weights.bin").read_bytes() == (hf_package(name) / "weights.bin").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_gguf_s(hf_folder, name):
    checkpoint = open_checkpoint(hf_folder(name))
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == checkpoint.architecture)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
    for tensor in checkpoint.tensors:
        stem = re.sub(r"blk\.\d+\.", "blk.{bid}.", tensor).removesuffix(".weight").removesuffix(".bias")
        assert stem in known, tensor


@pytest.mark.parametrize(
    ("kinds", "bits"),
    [
        ({"exps": Type.Q4_0}, (4, 4)),
        ({"exps": Type.Q8_0}, (8, 8)),
        ({"down_exps": Type.Q8_0, "exps": Type.Q4_0}, (8, 8)),  # 4 bits widened
        ({"up_exps": Type.Q5_0, "exps": Type.Q4_1}, (8, 8)),
        ({"exps": Type.Q4_0, "attn_output": Type.Q8_0, "ssm_out": Type.Q5_1, "shexp": Type.Q5_0}, (4, 4)),
    ],
    ids=str,
)
def test_quantised_experts(hf_folder, tmp_path, kinds, bits):
    source = convert(hf_folder("qwen3-next"), tmp_path / "x.gguf", kinds)
    report = import_checkpoint(source, tmp_path / "p")
    package = Package(tmp_path / "p")
    found = tuple(package.weights[f"blk.0.experts_{part}"].part.format.bits for part in ("gate_up", "down"))
    assert found == bits
    carried = {tensor.name: tensor.exact for tensor in report.tensors if "exps" in tensor.name}
    assert all(carried.values()) == (Type.Q4_1 not in kinds.values())
    dense = Engine.load(dequantised(tmp_path / "p", tmp_path / "dense"), threads=1, accuracy="exact")
    expected, _ = read(dense, [PROMPT])
    exact, _ = read(Engine.load(tmp_path / "p", threads=1, accuracy="exact"), [PROMPT])
    assert np.abs(exact - expected).max() < 1e-4 * np.abs(expected).max()
    fast, _ = read(Engine.load(tmp_path / "p", threads=1, accuracy="fast"), [PROMPT])
    errors = np.linalg.norm(fast - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(errors) < 0.15
