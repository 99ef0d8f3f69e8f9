"""Hugging Face folders: shards, types, FP8 blocks, and one clear sentence for everything that does not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import quants
from ml_dtypes import bfloat16, float8_e4m3fn
from test_golden_hf import GOLDEN, PROMPT, read
from tiny_hf import random_weights, write_hf_checkpoint, write_safetensors

from lsp_agent.engine.checkpoints.checkpoint import open_checkpoint
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.checkpoints.safetensors_file import read_safetensors
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.package import Package
from lsp_agent.errors import UserError

NEXT = "qwen3-next"


def saved(name=NEXT):
    checkpoint = json.loads(str(GOLDEN[f"{name}.checkpoint"]))
    return checkpoint["config"], random_weights(checkpoint["shapes"], checkpoint["config"])


def values(tensor) -> np.ndarray:
    raw = np.ascontiguousarray(tensor.read(0, tensor.rows))
    return quants.dequantize(raw, tensor.type).reshape(tensor.rows, tensor.columns)


def weights_of(package) -> bytes:
    return (package / "weights.bin").read_bytes()


def test_shards_make_the_same_package(hf_folder, hf_package, tmp_path):
    report = import_checkpoint(hf_folder(NEXT, shards=3), tmp_path / "p")
    assert weights_of(tmp_path / "p") == weights_of(hf_package(NEXT))
    assert all(tensor.exact for tensor in report.tensors)
    assert report.package_bytes == sum(path.stat().st_size for path in (tmp_path / "p").iterdir())


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", bfloat16), ("F16", np.float16)])
def test_16_bit_weights_are_kept(hf_folder, tmp_path, dtype, kind):
    config, weights = saved()
    import_checkpoint(hf_folder(NEXT, dtype), tmp_path / "p")

    def kept(name, array):  # BF16 matrices become F16, which rounds numbers below 6e-5; vectors become fp32
        wide = array.astype(kind).astype(np.float32)
        matrix = array.ndim == 2 and "embed_tokens" not in name and "shared_expert_gate" not in name
        return wide.astype(np.float16).astype(np.float32) if matrix else wide

    rounded = {name: kept(name, array) for name, array in weights.items()}
    import_checkpoint(write_hf_checkpoint(tmp_path / "wide", config, rounded), tmp_path / "q")
    engines = [Engine.load(tmp_path / name, threads=1, accuracy="exact") for name in "pq"]
    logits = [read(engine, [PROMPT])[0] for engine in engines]
    np.testing.assert_array_equal(*logits)


def test_fp8_blocks_are_multiplied_by_their_scales(tmp_path):
    random = np.random.RandomState(0)
    codes = random.randint(0, 0x70, (200, 288)).astype(np.uint8)  # no NaN
    scales = random.uniform(0.5, 2, (2, 3)).astype(np.float32)
    config, weights = saved()
    folder = write_hf_checkpoint(tmp_path / "c", config, weights)
    name = "model.layers.0.linear_attn.out_proj.weight"
    tensors = {**weights, name: codes, f"{name}_scale_inv": scales}
    write_safetensors(folder / "model.safetensors", tensors)
    tensor = open_checkpoint(folder).tensors["blk.0.ssm_out.weight"]
    expected = codes.view(float8_e4m3fn).astype(np.float32)
    expected *= np.kron(scales, np.ones((128, 128), np.float32))[:200, :288]
    np.testing.assert_array_equal(values(tensor), expected)
    chunk = quants.dequantize(np.ascontiguousarray(tensor.read(120, 140)), tensor.type).reshape(20, 288)
    np.testing.assert_array_equal(chunk, expected[120:140])
    write_safetensors(folder / "model.safetensors", {**weights, name: codes})
    with pytest.raises(UserError, match=r"scales \(2, 3\) of the FP8 tensor .*out_proj"):
        open_checkpoint(folder)


def test_layouts_are_gguf_s(hf_folder):
    _, weights = saved()
    tensors = open_checkpoint(hf_folder(NEXT)).tensors
    packed = weights["model.layers.0.linear_attn.in_proj_qkvz.weight"].reshape(2, -1, 64)  # 2 key heads
    parts = np.split(packed, np.cumsum([16, 16, 48]), axis=1)
    query, key, value, gate = (part.reshape(-1, 64) for part in parts)
    np.testing.assert_array_equal(values(tensors["blk.0.attn_qkv.weight"]), np.concatenate([query, key, value]))
    np.testing.assert_array_equal(values(tensors["blk.0.attn_gate.weight"]), gate)
    expected = -np.exp(weights["model.layers.0.linear_attn.A_log"])
    np.testing.assert_array_equal(values(tensors["blk.0.ssm_a"])[0], expected)
    for ours, theirs, plus in (
        ("attn_norm", "input_layernorm", 1),
        ("post_attention_norm", "post_attention_layernorm", 1),
        ("ssm_norm", "linear_attn.norm", 0),
    ):
        expected = weights[f"model.layers.0.{theirs}.weight"] + plus
        np.testing.assert_array_equal(values(tensors[f"blk.0.{ours}.weight"])[0], expected)
    experts = values(tensors["blk.1.ffn_up_exps.weight"]).reshape(16, 32, 64)
    np.testing.assert_array_equal(experts[11], weights["model.layers.1.mlp.experts.11.up_proj.weight"])


def test_tokenizer_and_special_tokens(hf_package):
    package = Package(hf_package(NEXT))
    engine = Engine.load(hf_package(NEXT), threads=1)
    vocabulary = engine.tokenizer
    text = "def f(x):\n    return x\n"
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert engine.chat_prompt([{"role": "user", "content": "hi"}]).ids
    assert len(package.header["tokens"]["end"]) == 2 and "prefix" in package.header["tokens"]["fim"]


def broken(tmp_path, change):
    config, weights = saved()
    change(config, weights)
    return write_hf_checkpoint(tmp_path / "c", config, weights)


def test_missing_surplus_and_misshapen_tensors_are_named_together(tmp_path):
    def change(config, weights):
        del weights["model.layers.3.self_attn.k_norm.weight"]
        del weights["model.layers.2.mlp.experts.5.down_proj.weight"]
        weights["model.layers.0.self_attn.sinks"] = np.zeros(4, np.float32)
        weights["model.layers.1.linear_attn.out_proj.weight"] = np.zeros((64, 95), np.float32)
        weights["mtp.norm.weight"] = np.zeros(4, np.float32)  # the draft head is not surplus

    with pytest.raises(UserError) as caught:
        import_checkpoint(broken(tmp_path, change), tmp_path / "p")
    message = str(caught.value)
    assert "lacks blk.3.attn_k_norm.weight" in message
    assert "surplus model.layers.0.self_attn.sinks" in message
    assert "blk.1.ssm_out.weight 64 x 95 instead of 64 x 96" in message
    assert "blk.2.ffn_down_exps.weight 960 x 32 instead of 1024 x 32" in message
    assert "mtp" not in message and "\n" not in message
    assert not (tmp_path / "p").exists()


def test_a_tied_head_is_the_embedding_even_if_it_is_stored(tmp_path):
    config, weights = saved("qwen3")
    weights["lm_head.weight"] = np.ones((288, 64), np.float32)
    import_checkpoint(write_hf_checkpoint(tmp_path / "c", config, weights), tmp_path / "p")
    logits, _ = read(Engine.load(tmp_path / "p", threads=1, accuracy="exact"), [PROMPT])
    expected = GOLDEN["qwen3.logits"]
    assert np.abs(logits[GOLDEN["positions"]] - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "mamba"}, "'mamba' are not supported"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0}}, "rope scaling 'dynamic'"),
        ({"num_hidden_layers": "many"}, "config.json"),
        ({"num_experts_per_tok": None}, "config.json"),
        ({"num_experts_per_tok": 17}, "17 of 16 experts"),
        ({"num_hidden_layers": 10**12}, "1000000000000 layers"),
        ({"decoder_sparse_step": 0}, "config.json has a number that makes no sense"),
        ({"vocab_size": float("inf")}, "config.json has a number that makes no sense"),
        ({"num_attention_heads": 0, "head_dim": None}, "config.json has a number that makes no sense"),
        ({"rope_scaling": {"type": "linear", "factor": 0}, "rope_parameters": None}, "rope factor 0"),
        ({"model_type": ["qwen3_next"]}, "are not supported"),
        ({"linear_num_key_heads": 4}, "does not hold the tensors"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_do_not_fit(tmp_path, change, match):
    with pytest.raises(UserError, match=match) as caught:
        import_checkpoint(broken(tmp_path, lambda config, _: config.update(change)), tmp_path / "p")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", ["3", "15"])
def test_experts_are_who_their_numbers_say(tmp_path, lost):
    def renumber(_, weights):  # one is missing, and the numbers go on to make up for it
        for part in ("gate", "up", "down"):
            name = f"model.layers.1.mlp.experts.{{}}.{part}_proj.weight"
            weights[name.format(16)] = weights.pop(name.format(lost))

    with pytest.raises(UserError, match=r"surplus model\.layers\.1\.mlp\.experts\.16.*misfits: .*480 x 64"):
        import_checkpoint(broken(tmp_path, renumber), tmp_path / "p")


def test_experts_of_different_sizes_are_misshapen(tmp_path):
    def reshape(_, weights):
        names = [f"model.layers.1.mlp.experts.{index}.up_proj.weight" for index in (3, 4)]
        rows = np.concatenate([weights[name] for name in names])
        weights[names[0]], weights[names[1]] = rows[:16], rows[16:]

    with pytest.raises(UserError, match=r"misfits: .*blk\.1\.ffn_up_exps\.weight"):
        import_checkpoint(broken(tmp_path, reshape), tmp_path / "p")


def test_names_of_tensors_do_nothing_to_the_terminal(tmp_path):
    with pytest.raises(UserError, match=r"surplus x\\x1b\[2J y") as caught:
        folder = broken(tmp_path, lambda _, weights: weights.update({"x\x1b[2J\ny": np.zeros(4, np.float32)}))
        import_checkpoint(folder, tmp_path / "p")
    assert str(caught.value).isprintable()


def test_json_that_is_nested_without_end_is_damaged(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder(NEXT), tmp_path / "c")
    (folder / "config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"config\.json is missing or damaged"):
        open_checkpoint(folder)


def test_missing_and_damaged_files(hf_folder, tmp_path):
    def copy(name, shards=1):
        return shutil.copytree(hf_folder(NEXT, shards=shards), tmp_path / name)

    folder = copy("shard", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00003\.safetensors"):
        import_checkpoint(folder, tmp_path / "p")
    folder = copy("config")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is missing or damaged"):
        import_checkpoint(folder, tmp_path / "p")
    folder = copy("tokenizer")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"lacks a readable tokenizer\.json"):
        import_checkpoint(folder, tmp_path / "p")
    with pytest.raises(UserError, match="give the folder"):
        import_checkpoint(folder / "model.safetensors", tmp_path / "p")
    data = (folder / "model.safetensors").read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(UserError, match="truncated or damaged"):
            import_checkpoint(folder, tmp_path / "p")


def test_pickles_are_refused_in_one_sentence(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder(NEXT), tmp_path / "c")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no safetensors files"):
        import_checkpoint(folder, tmp_path / "p")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(UserError, match=r"pickle files, which can run code and are never loaded; use a .* safetensors"):
        import_checkpoint(folder, tmp_path / "p")


def test_a_folder_of_gguf_files(tmp_path):
    (tmp_path / "b.gguf").touch()
    (tmp_path / "a.gguf").touch()
    with pytest.raises(UserError, match=r"folder of GGUF files; give one of them, such as a\.gguf"):
        open_checkpoint(tmp_path)


def test_damaged_indexes(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder(NEXT, shards=3), tmp_path / "c")
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../../etc/passwd"}}'):
        index.write_text(text)
        with pytest.raises(UserError, match=r"damaged|lacks") as caught:
            import_checkpoint(folder, tmp_path / "p")
        assert "\n" not in str(caught.value)
    index.unlink()
    with pytest.raises(UserError, match=r"lacks model\.safetensors\.index\.json"):
        import_checkpoint(folder, tmp_path / "p")
    lost = next(name for name, file in whole["weight_map"].items() if file.startswith("model-00002"))
    kept = {name: file for name, file in whole["weight_map"].items() if not file.startswith("model-00002")}
    index.write_text(json.dumps({"weight_map": kept}))  # an index that does not know of a shard
    with pytest.raises(UserError, match=r"it lacks .* more"):
        import_checkpoint(folder, tmp_path / "p")
    assert lost


def test_infinite_sizes_in_a_header(tmp_path):
    header = b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 4]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="truncated or damaged"):
        read_safetensors(tmp_path / "x.safetensors")


def test_a_shard_that_shrinks_while_it_is_read_is_no_crash(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder(NEXT), tmp_path / "c")
    checkpoint = open_checkpoint(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    with pytest.raises(UserError, match="is truncated; download it again"):
        for tensor in checkpoint.tensors.values():
            tensor.read(0, tensor.rows)


def test_experts_of_several_types_are_read_as_fp32(tmp_path):
    config, weights = saved()
    folder = write_hf_checkpoint(tmp_path / "c", config, weights)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    write_safetensors(folder / "model-00001-of-00002.safetensors", {n: w for n, w in weights.items() if n != name})
    write_safetensors(folder / "model-00002-of-00002.safetensors", {name: weights[name]}, "BF16")
    (folder / "model.safetensors").unlink()
    shards = {n: f"model-0000{1 + (n == name)}-of-00002.safetensors" for n in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    tensor = open_checkpoint(folder).tensors["blk.1.ffn_up_exps.weight"]
    experts = values(tensor).reshape(16, 32, 64)
    np.testing.assert_array_equal(experts[3], weights[name].astype(bfloat16).astype(np.float32))
    np.testing.assert_array_equal(experts[4], weights[name.replace("experts.3", "experts.4")])
    part = np.ascontiguousarray(tensor.read(3 * 32 - 5, 4 * 32 + 7)).view(np.float32)  # across three pieces
    np.testing.assert_array_equal(part, experts.reshape(-1, 64)[3 * 32 - 5 : 4 * 32 + 7])


def test_shards_are_not_mapped_into_memory(hf_folder):
    if not (maps := Path("/proc/self/maps")).exists():
        pytest.skip("no /proc")
    folder = hf_folder(NEXT, "BF16")
    for tensor in (checkpoint := open_checkpoint(folder)).tensors.values():
        tensor.read(0, tensor.rows)
    assert checkpoint.files() == [folder / "model.safetensors"]
    assert str(folder) not in maps.read_text()


def test_random_damage_to_the_header_never_ends_in_a_traceback(hf_folder, tmp_path):
    folder = shutil.copytree(hf_folder("qwen3"), tmp_path / "c")
    data = np.frombuffer((folder / "model.safetensors").read_bytes(), np.uint8)
    random = np.random.RandomState(0)
    for _ in range(40):
        damaged = data.copy()
        damaged[random.randint(0, 3000, 3)] ^= random.randint(1, 256, 3).astype(np.uint8)
        (folder / "model.safetensors").write_bytes(damaged.tobytes())
        try:
            import_checkpoint(folder, tmp_path / "p")
        except UserError as error:
            assert "\n" not in str(error)
