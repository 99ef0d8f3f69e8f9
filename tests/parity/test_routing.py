"""Routing: exactly the experts that transformers' router picks, with exactly its weights.

ONNX Runtime routes inside one operator, so the weights are made to show in its result: in a model of one block in
which attention adds nothing, expert `e` adds the same number for every `e`, at place `e` of the hidden state, and the
head passes the hidden state on.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from reading import read
from reference import make_reference

from lsp_agent.engine.architectures import ARCHITECTURES
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.package import Package
from lsp_agent.engine.session import Decoder

pytestmark = [pytest.mark.parity, pytest.mark.timeout(7200)]
EXAMPLES = int(os.environ.get("LSP_AGENT_PARITY_EXAMPLES", "100"))
HIDDEN, WIDTH, VOCABULARY = 96, 16, 288
NEAR_TIE = 1e-5
MIXTURES = ["qwen2_moe", "qwen3_moe", "qwen3_next"]


def test_every_mixture_is_here():
    assert [one.hf_name for one in ARCHITECTURES.values() if one.hf_name not in ("qwen2", "qwen3")] == MIXTURES


def reveal(model) -> None:
    """Make the weights of the experts show (see above)."""
    block = model.model.layers[0]
    block.self_attn.o_proj.weight.zero_()
    experts = block.mlp.experts
    count = len(experts.down_proj)
    experts.gate_up_proj.zero_()
    experts.down_proj.zero_()
    experts.gate_up_proj[:, 0, HIDDEN - 1] = 4.0  # gate and up read one value of the hidden state, whatever the expert
    experts.gate_up_proj[:, WIDTH, HIDDEN - 1] = 1.0
    for expert in range(count):
        experts.down_proj[expert, expert, 0] = 1.0
    if hasattr(block.mlp, "shared_expert"):
        block.mlp.shared_expert.down_proj.weight.zero_()
    model.model.embed_tokens.weight[:, :count] = 0.0  # places of the experts
    model.model.embed_tokens.weight[:, HIDDEN - 1] = 1.0
    model.lm_head.weight.zero_()
    model.lm_head.weight[:HIDDEN, :HIDDEN] = model.lm_head.weight.new_ones(HIDDEN).diag()
    for norm in (model.model.norm, block.post_attention_layernorm):
        norm.weight.fill_(0.0 if model.config.model_type == "qwen3_next" else 1.0)  # the former adds one


@pytest.mark.parametrize("model_type", MIXTURES)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    experts=st.sampled_from([2, 4, 7, 32, 64]),
    used=st.integers(1, 10),
    normalise=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_experts_and_weights(model_type, experts, used, normalise, seed):
    import torch

    used = min(used, experts)
    values = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
        "num_experts": experts, "num_experts_per_tok": used, "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": 16, "norm_topk_prob": normalise, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        "layer_types": ["full_attention"],
    }  # fmt: skip
    if model_type == "qwen2_moe":
        del values["head_dim"]
    folder = Path(tempfile.mkdtemp())
    try:
        model = make_reference(model_type, values, seed, folder / "checkpoint", reveal)
        routed = {}
        model.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, output: routed.update(router=output))
        ids = np.random.RandomState(seed).randint(0, VOCABULARY, 40)
        with torch.no_grad():
            model(torch.tensor([ids.tolist()]), use_cache=False)
        logits, weights, chosen = (tensor.numpy() for tensor in routed["router"])
        probabilities = np.sort(torch.tensor(logits).softmax(-1).numpy(), -1)[:, ::-1]
        if used < experts:
            assume((probabilities[:, used - 1] - probabilities[:, used]).min() > NEAR_TIE)
        note(f"smallest weight {weights.min():.1e}")
        import_checkpoint(folder / "checkpoint", folder / "package")
        decoder = Decoder(Package(folder / "package"), threads=1, context=64, accuracy="exact")
        for pieces in ([ids], [[token] for token in ids]):
            # The last norm divides all places by one number, which the last place, always 1 before it, tells.
            hidden = read(decoder, pieces)[:, :HIDDEN]
            found = hidden[:, :experts] / hidden[:, HIDDEN - 1 :]
            table = model.model.embed_tokens.weight.detach().numpy()[ids].astype(np.float64)
            read_value = 1 / np.sqrt((table**2).mean(-1, keepdims=True) + model.config.rms_norm_eps)
            found = found / (4 * read_value / (1 + np.exp(-4 * read_value)) * read_value)
            expected = np.zeros_like(found)
            np.put_along_axis(expected, chosen, weights, axis=1)
            assert ((found != 0) == (expected != 0)).all()
            assert np.abs(found - expected).max() < 2e-6
    finally:
        shutil.rmtree(folder)
