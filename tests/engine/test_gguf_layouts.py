"""Real GGUF files differ in layout: fused projections, older orders, several files, blocks that are left out."""

from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from random_gguf import CONTEXT, Sizes, random_gguf

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.architecture import RopeScaling
from lsp_agent.engine.checkpoints.checkpoint import open_checkpoint
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.package import Package
from lsp_agent.errors import UserError

SMALL = Sizes(hidden=64, heads=4, head=16, intermediate=32, experts=4, used=2, expert_width=32, shared_width=32,
              rotary=16, linear_head=16)  # fmt: skip
QUANTISED = {"": Type.Q4_0, "ssm": Type.Q8_0, "attn_k": Type.Q8_0}
FUSED = {"": Type.Q4_0, "attn": Type.Q5_0}


def package(made, folder, **options):
    import_checkpoint(made.write(folder / "model.gguf", **options), folder / "package")
    return Package(folder / "package")


def assert_same(ours, theirs):
    assert ours.config == theirs.config
    assert ours.weights == theirs.weights
    assert (ours.path / "weights.bin").read_bytes() == (theirs.path / "weights.bin").read_bytes()


@pytest.fixture
def folders(tmp_path):
    for name in ("plain", "other"):
        (tmp_path / name).mkdir()
    return tmp_path / "plain", tmp_path / "other"


@pytest.mark.parametrize("kinds", [{}, FUSED], ids=["fp32", "quantised"])
@pytest.mark.parametrize("name", ["qwen2", "qwen2moe", "qwen3", "qwen3moe", "qwen3next"])
def test_fused_projections(folders, name, kinds):
    plain, other = folders
    fused = random_gguf(name, kinds, sizes=SMALL).fuse()
    assert not any("attn_q.weight" in tensor or "ffn_up_exps" in tensor for tensor in fused.tensors)
    assert_same(package(fused, other), package(random_gguf(name, kinds, sizes=SMALL), plain))


@pytest.mark.parametrize("kinds", [{}, QUANTISED], ids=["fp32", "quantised"])
@pytest.mark.parametrize("value_heads", [2, 4, 6])
def test_projections_ordered_by_key_head(folders, kinds, value_heads):
    plain, other = folders
    sizes = replace(SMALL, value_heads=value_heads)
    older = random_gguf("qwen3next", kinds, sizes=sizes).order_by_key_head()
    assert "blk.0.ssm_in.weight" in older.tensors and "blk.0.attn_gate.weight" not in older.tensors
    assert_same(package(older, other), package(random_gguf("qwen3next", kinds, sizes=sizes), plain))


def test_blocks_of_multi_token_prediction_are_left_out(folders):
    plain, other = folders
    predicting = random_gguf("qwen3next", sizes=SMALL).add_prediction_block()
    assert_same(package(predicting, other), package(random_gguf("qwen3next", sizes=SMALL), plain))


def test_recurrent_layers_are_listed(folders):
    _, other = folders
    made = random_gguf("qwen3next", sizes=SMALL)
    made.metadata |= {"attention.recurrent_layers": [True, True, False], "full_attention_interval": 2}
    assert package(made, other).config.linear_attention.layers == (0, 1)


def test_rope_scaling_is_read(folders):
    plain, other = folders
    made = random_gguf("qwen3", sizes=SMALL)
    made.metadata |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    assert package(made, plain).config.rope_scaling == RopeScaling("yarn", 4.0, CONTEXT)
    made.metadata |= {"rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.25}
    found = package(made, other).config.rope_scaling
    assert (found.original_context, found.attention_factor) == (128, pytest.approx(1.25 * (1 + 0.1 * np.log(4))))


def test_biases_follow_from_the_tensors(folders):
    plain, other = folders
    without = random_gguf("qwen2moe", sizes=SMALL)
    for name in [name for name in without.tensors if name.endswith(".bias")]:
        del without.tensors[name]
    assert package(random_gguf("qwen2moe", sizes=SMALL), plain).config.attention_bias
    assert not package(without, other).config.attention_bias


def test_several_files_are_one_checkpoint(folders):
    plain, other = folders
    whole = package(random_gguf("qwen3next", QUANTISED, sizes=SMALL), plain)
    split = package(random_gguf("qwen3next", QUANTISED, sizes=SMALL), other, tensors_a_file=7)
    files = sorted(other.glob("*.gguf"))
    assert len(files) > 3 and open_checkpoint(files[0]).files() == files
    assert_same(split, whole)
    import_checkpoint(files[2], other / "from-another")
    assert_same(Package(other / "from-another"), whole)


def test_a_missing_file_is_named(folders):
    _, other = folders
    first = random_gguf("qwen3", sizes=SMALL).write(other / "model.gguf", tensors_a_file=7)
    files = sorted(other.glob("*.gguf"))
    files[1].unlink()
    with pytest.raises(UserError, match=rf"lacks {files[1].name}; download the rest"):
        open_checkpoint(first)


def test_files_of_another_split_are_refused(folders):
    plain, other = folders
    first = random_gguf("qwen3", sizes=SMALL).write(plain / "model.gguf", tensors_a_file=20)
    random_gguf("qwen3", sizes=SMALL).write(other / "model.gguf", tensors_a_file=19)
    (plain / first.name.replace("00001-of", "00002-of")).write_bytes(
        (other / first.name.replace("00001-of", "00002-of")).read_bytes()
    )
    with pytest.raises(UserError, match="do not belong together"):
        open_checkpoint(first)


@pytest.mark.parametrize("name", ["ffn_gate_up_exps", "attn_qkv"])
def test_a_misshapen_fused_tensor_is_named(folders, name):
    _, other = folders
    made = random_gguf("qwen3moe", sizes=SMALL).fuse()
    kind, raw, shape = made.tensors[f"blk.0.{name}.weight"]
    less = shape[-2] - 1
    cut = raw.reshape(*shape[:-1], -1)[..., :less, :]
    made.tensors[f"blk.0.{name}.weight"] = kind, cut.reshape(-1, cut.shape[-1]), (*shape[:-2], less, shape[-1])
    with pytest.raises(UserError, match=r"misfits: blk\.0\.(ffn_gate_exps|attn_q)"):
        package(made, other)


@pytest.mark.parametrize("accuracy", ["fast", "exact"])
@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K, Type.Q4_1, Type.Q6_K])
def test_a_prompt_longer_than_a_chunk(tmp_path, kind, accuracy):
    """Within a prefill the head is given no rows, with corrections for the types that have minima as without."""
    made = random_gguf("qwen2", {"": kind}, sizes=Sizes(layers=1))
    import_checkpoint(made.write(tmp_path / "model.gguf"), tmp_path / "package")
    engine = Engine.load(tmp_path / "package", threads=1, accuracy=accuracy)
    prompt = np.random.RandomState(0).randint(0, 256, 300).tolist()
    steps = engine.generate(prompt, Sampling(max_tokens=3), CancelToken(), stop_ids=())
    assert len(list(steps)) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention.head_count_kv", [2, 2, 2]), ("block_count", 10**9), ("expert_used_count", 5), ("context_length", 0)],
)
def test_metadata_that_makes_no_sense_is_one_sentence(tmp_path, key, value):
    made = random_gguf("qwen3moe", QUANTISED, sizes=SMALL)
    made.metadata[key] = value
    with pytest.raises(UserError, match=r"model\.gguf has a number that makes no sense"):
        open_checkpoint(made.write(tmp_path / "model.gguf")).config()


def test_of_many_missing_files_a_few_are_named(tmp_path):
    (tmp_path / "model-00002-of-09000.gguf").touch()
    with pytest.raises(UserError, match=r"lacks model-00001-of-09000\.gguf, .* and 8994 more; download") as caught:
        open_checkpoint(tmp_path / "model-00002-of-09000.gguf")
    assert len(str(caught.value)) < 500
