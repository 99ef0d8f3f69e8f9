"""Random configurations of every architecture against transformers in fp32, through checkpoints that it wrote itself.

Needs torch: `make test-parity` installs it. `LSP_AGENT_PARITY_EXAMPLES` sets how many configurations are tried.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st
from tiny_hf import write_tokenizer

from lsp_agent.engine.architectures import ARCHITECTURES
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.package import Package
from lsp_agent.engine.session import Decoder
from lsp_agent.engine.state import State

pytestmark = [pytest.mark.parity, pytest.mark.timeout(7200)]
EXAMPLES = int(os.environ.get("LSP_AGENT_PARITY_EXAMPLES", "30"))
TOLERANCE = 1e-4
NEAR_TIE = 1e-5
"""Router probabilities closer than this may be ordered differently by two correct programs."""


@st.composite
def ropes(draw) -> dict[str, Any]:
    rope = {"rope_theta": draw(st.sampled_from([1e4, 1e6, 1e7]))}
    kind = draw(st.sampled_from(["default", "default", "linear", "yarn"]))
    if kind == "yarn":
        rope["original_max_position_embeddings"] = draw(st.sampled_from([16, 64]))
        if draw(st.booleans()):
            rope |= {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0}
    if kind != "default":
        rope["factor"] = draw(st.sampled_from([2.0, 4.0]))
    return {"rope_type": kind, **rope}


@st.composite
def configs(draw, model_type: str) -> dict[str, Any]:
    """A small configuration: layers and their interleave, heads, head sizes, experts, biases, tying, rope."""
    layers = draw(st.integers(1, 4))
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    head = draw(st.sampled_from([16, 32, 64]))
    config: dict[str, Any] = {
        "vocab_size": 288, "hidden_size": draw(st.sampled_from([64, 96, 160])),
        "intermediate_size": draw(st.sampled_from([32, 80])), "num_hidden_layers": layers,
        "num_attention_heads": kv_heads * group, "num_key_value_heads": kv_heads, "head_dim": head,
        "max_position_embeddings": 128, "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()), "rope_parameters": draw(ropes()),
    }  # fmt: skip
    if model_type in ("qwen3", "qwen3_moe"):
        config["attention_bias"] = draw(st.booleans())
    if model_type in ("qwen2", "qwen2_moe"):
        config["hidden_size"] = config["num_attention_heads"] * head
        del config["head_dim"]
    if model_type == "qwen2_moe":
        config["qkv_bias"] = draw(st.booleans())
    if model_type not in ("qwen2", "qwen3"):
        experts = draw(st.sampled_from([4, 7, 32]))
        config |= {
            "num_experts": experts, "num_experts_per_tok": draw(st.integers(1, min(experts, 10))),
            "moe_intermediate_size": draw(st.sampled_from([16, 48])), "norm_topk_prob": draw(st.booleans()),
            "decoder_sparse_step": draw(st.sampled_from([1, 1, 2])),
            "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), max_size=1)),
        }  # fmt: skip
    if model_type in ("qwen2_moe", "qwen3_next"):
        config["shared_expert_intermediate_size"] = draw(st.sampled_from([16, 64]))
    if model_type == "qwen3_next":
        kinds = st.sampled_from(["linear_attention", "full_attention"])
        config |= {
            "layer_types": draw(st.lists(kinds, min_size=layers, max_size=layers)),
            "linear_num_key_heads": (keys := draw(st.integers(1, 3))),
            "linear_num_value_heads": keys * draw(st.sampled_from([1, 2, 4])),
            "linear_key_head_dim": draw(st.sampled_from([8, 16, 64])),
            "linear_value_head_dim": draw(st.sampled_from([8, 24, 64])),
            "linear_conv_kernel_dim": draw(st.sampled_from([2, 3, 4])),
        }
        rotary = draw(st.sampled_from([size for size in (16, 32, 64) if size <= head]))
        config["rope_parameters"]["partial_rotary_factor"] = rotary / head
    return config


def make_reference(model_type: str, values: dict[str, Any], seed: int, folder: Path):
    """A random model of transformers, saved (in shards) by its own `save_pretrained`."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter += 0.2 * torch.randn_like(parameter)
            elif name.endswith("bias") and "dt_bias" not in name:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "A_log" not in name and "dt_bias" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "conv1d" in name or "embed" in name else 0.12))
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size="100KB")
    write_tokenizer(folder)
    return model


def sensitivity(model, ids: list[int], expected: np.ndarray) -> float:
    """How far the reference's own logits move when every weight is off by about one unit in the last place.

    Gated DeltaNet normalises `S^T q`, so where a query is nearly orthogonal to what was stored, any earlier rounding
    is magnified (by 1 / |q.k|): there two correct programs differ by more than 1e-4, since they sum in other orders.
    """
    import torch

    perturbed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in perturbed.parameters():
            parameter *= 1 + torch.randn_like(parameter) * 2.0**-23
    moved, _ = reference_logits(perturbed, ids)
    return float(np.abs(moved - expected).max() / np.abs(expected).max())


def reference_logits(model, ids: list[int]) -> tuple[np.ndarray, float]:
    """Logits of all positions, and how close the routing of any token came to a tie."""
    import torch

    margins = [np.inf]

    def watch(module, _, output) -> None:
        probabilities = output[0].float().softmax(-1).sort(-1, descending=True).values
        if module.top_k < probabilities.shape[-1]:
            margins.append(float((probabilities[:, module.top_k - 1] - probabilities[:, module.top_k]).min()))

    routers = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    handles = [router.register_forward_hook(watch) for router in routers]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    for handle in handles:
        handle.remove()
    return logits, min(margins)


@pytest.mark.parametrize("model_type", [architecture.hf_name for architecture in ARCHITECTURES.values()])
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_configuration(model_type, data):
    """One-shot prefill, prefill at random splits and step-by-step decoding, all within 1e-4 of the reference.

    More only where the reference itself is that sensitive to rounding.
    """
    values = data.draw(configs(model_type))
    seed = data.draw(st.integers(0, 2**31))
    length = data.draw(st.integers(2, 90))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6)))
    folder = Path(tempfile.mkdtemp())
    try:
        model = make_reference(model_type, values, seed, folder / "checkpoint")
        ids = np.random.RandomState(seed).randint(0, 288, length)
        expected, margin = reference_logits(model, ids.tolist())
        moved = sensitivity(model, ids.tolist(), expected)
        note(f"{values}, seed {seed}, {length} tokens, cut at {cuts}, routing margin {margin:.1e}, moved {moved:.1e}")
        import_checkpoint(folder / "checkpoint", folder / "package")
        decoder = Decoder(Package(folder / "package"), threads=1, context=128, accuracy="exact")
        if margin < NEAR_TIE:
            return
        for pieces in ([ids], np.split(ids, cuts), [[token] for token in ids]):
            state = State(decoder.states, 128)
            logits = []
            for piece in pieces:
                logits.append(decoder.run(np.array([piece], np.int64), state, range(len(piece))))
                state.extend(list(piece))
            error = np.abs(np.concatenate(logits) - expected).max() / np.abs(expected).max()
            event(f"error below {10 ** np.ceil(np.log10(error + 1e-9)):.0e}")
            assert error < max(TOLERANCE, 10 * moved), f"{len(pieces)} pieces: {error:.1e}"
    finally:
        shutil.rmtree(folder)
