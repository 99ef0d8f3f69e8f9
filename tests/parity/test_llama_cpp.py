"""The engine against llama.cpp on the same random GGUF files: identical greedy tokens.

Needs npm, which installs llama.cpp prebuilt (node-llama-cpp) into build/parity; skipped where there is none.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from llama_cpp import Answer, LlamaCpp, UnavailableError, install
from random_gguf import CONTEXT, RandomGguf, Sizes, random_gguf
from reading import read

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.engine import Engine

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]
TOKENS = 40
LENGTHS = (1, 5, 20, 70, 150, 300)
"""Around llama.cpp's chunk of 64 tokens of linear attention, and beyond our own of 256 tokens of prefill."""
TOLERANCE = 3e-4
"""Of the largest logit. llama.cpp multiplies up the angles of rotary positions, so its error grows with them."""
MIXED = {"": Type.Q4_K, "exps": Type.Q4_0, "attn_v": Type.Q6_K, "down_shexp": Type.Q5_K, "token_embd": Type.Q6_K}
NEXT = Sizes(layers=4, interval=4, heads=8, kv_heads=1, head=32, rotary=16, value_heads=2, linear_head=128)
YARN = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
STRETCH = {"rope.scaling.attn_factor": 1.2}


def with_rope(made: RandomGguf, kind: str, **metadata: float) -> RandomGguf:
    made.metadata |= {"rope.scaling.type": kind, **metadata}
    return made


CASES = {
    "qwen2": random_gguf("qwen2"),
    "qwen2-tied": random_gguf("qwen2", tied=True, seed=1),
    "qwen2-q4_k": random_gguf("qwen2", {"": Type.Q4_K, "attn_v": Type.Q6_K, "ffn_down": Type.Q6_K}),
    "qwen3": random_gguf("qwen3"),
    "qwen3-q8_0": random_gguf("qwen3", {"": Type.Q8_0}),
    "qwen3-q4_1": random_gguf("qwen3", {"": Type.Q4_1, "attn": Type.Q5_1}, tied=True),
    "qwen2moe": random_gguf("qwen2moe"),
    "qwen2moe-q5_0": random_gguf("qwen2moe", {"": Type.Q5_0, "exps": Type.Q4_0}),
    "qwen3moe": random_gguf("qwen3moe", seed=1),
    "qwen3moe-q4_k": random_gguf("qwen3moe", {"": Type.Q4_K, "exps": Type.Q8_0}),
    "qwen3next": random_gguf("qwen3next"),
    "qwen3next-other": random_gguf("qwen3next", sizes=NEXT, seed=2),
    "qwen3next-q4_0": random_gguf("qwen3next", {"": Type.Q4_0, "output": Type.Q8_0}),
    "qwen3next-mixed": random_gguf("qwen3next", MIXED),
    "qwen3-fused": random_gguf("qwen3", {"": Type.Q8_0}).fuse(),
    "qwen3next-fused": random_gguf("qwen3next", {"exps": Type.Q4_0}).fuse(),
    "qwen3next-by-key-head": random_gguf("qwen3next", {"ssm_in": Type.Q8_0}).order_by_key_head(),
    "qwen3-linear": with_rope(random_gguf("qwen3"), "linear", **{"rope.scaling.factor": 4.0}),
    "qwen2-yarn": with_rope(random_gguf("qwen2"), "yarn", **YARN),
    "qwen3moe-yarn": with_rope(random_gguf("qwen3moe"), "yarn", **YARN, **STRETCH),
}
"""Types that the engine carries without loss, so that the weights are those of the file."""


@pytest.fixture(scope="module", autouse=True)
def llama():
    try:
        return install()
    except UnavailableError as reason:
        pytest.skip(f"llama.cpp cannot run: {reason}")


def prompts() -> list[list[int]]:
    random = np.random.RandomState(0)
    return [random.randint(0, 256, length).tolist() for length in LENGTHS]


def load(made: RandomGguf, folder: Path) -> Engine:
    import_checkpoint(made.write(folder / "model.gguf"), folder / "package")
    return Engine.load(folder / "package", threads=1, context=CONTEXT, accuracy="exact")


def follow(engine: Engine, ids: list[int], answer: Answer) -> np.ndarray:
    """Our logits of llama.cpp's tokens, decoded step by step after the prompt."""
    pieces = [ids, *([token] for token in answer.tokens[:-1])]
    return read(engine._decoder, pieces)[len(ids) - 1 :]


def near_tie(engine: Engine, ids: list[int]) -> bool:
    """Whether the routing of some token is so close to a tie that our own ways of reading decide it differently."""
    whole, stepwise = read(engine._decoder, [ids]), read(engine._decoder, [[token] for token in ids])
    return bool(np.abs(whole - stepwise).max() > 10 * TOLERANCE * np.abs(whole).max())


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_llama_s(name, tmp_path):
    """llama.cpp reads the same weights in fp32, since it would round activations to 8 bits for quantised ones."""
    made = CASES[name]
    engine = load(made, tmp_path)
    worst, closest, ties, distinct = 0.0, np.inf, 0, set()
    with LlamaCpp(made.write(tmp_path / "fp32.gguf", dequantised=True)) as reference:
        for ids in prompts():
            expected = reference.greedy(ids, TOKENS)
            largest = np.abs(expected.logits).max()
            two = np.sort(expected.logits, -1)[:, -2:]
            gaps = (two[:, 1] - two[:, 0]) / largest
            logits = follow(engine, ids, expected)
            error = np.abs(logits - expected.logits).max() / largest
            parted = [(i, float(gaps[i])) for i in range(TOKENS) if logits[i].argmax() != expected.tokens[i]]
            tied = error >= TOLERANCE and near_tie(engine, [*ids, *expected.tokens])
            ties += tied
            assert error < TOLERANCE or tied, f"{len(ids)} tokens read: {error:.1e} of the largest logit"
            assert not parted, f"{len(ids)} tokens read: (step, gap of the two best logits) {parted}"
            steps = engine.generate(ids, Sampling(max_tokens=TOKENS), CancelToken(), stop_ids=())
            assert [step.token for step in steps] == expected.tokens
            worst, closest = max(worst, 0.0 if tied else float(error)), min(closest, float(gaps.min()))
            distinct |= set(expected.tokens)
    print(f"\n{name}: {len(LENGTHS)} x {TOKENS} tokens alike, {len(distinct)} distinct, {ties} near ties", end=" ")
    print(f"of routing, else error up to {worst:.1e}, smallest gap of the two best {closest:.1e} of the largest logit")
    assert ties <= 1
    assert len(distinct) > TOKENS  # else the texts would say little
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", ["qwen2-q4_k", "qwen3-q8_0", "qwen2moe-q5_0", "qwen3next-mixed", "experts-q4_k"])
def test_nearer_to_the_weights_than_llama_s_own_rounding(name, tmp_path):
    """On the quantised file itself llama.cpp rounds activations; the experts of K-quants are rounded by us."""
    kinds = {"": Type.Q4_K, "ffn_down_exps": Type.Q6_K}
    made = random_gguf("qwen3moe", kinds) if name == "experts-q4_k" else CASES[name]
    engine = load(made, tmp_path)
    ours, theirs, alike = [], [], 0
    with (
        LlamaCpp(made.write(tmp_path / "fp32.gguf", dequantised=True)) as reference,
        LlamaCpp(tmp_path / "model.gguf") as rounding,
    ):
        for ids in prompts():
            expected = reference.greedy(ids, TOKENS)
            rounded = rounding.greedy(ids, TOKENS, forced=expected.tokens).logits
            norm = np.linalg.norm(expected.logits)
            ours.append(np.linalg.norm(follow(engine, ids, expected) - expected.logits) / norm)
            theirs.append(np.linalg.norm(rounded - expected.logits) / norm)
            alike += int((rounded.argmax(-1) == expected.tokens).sum())
    print(f"\n{name}: relative error of the logits {np.mean(ours):.1e}, of llama.cpp's {np.mean(theirs):.1e};", end=" ")
    print(f"llama.cpp on the quantised file picks {alike} of {TOKENS * len(LENGTHS)} tokens alike")
    assert np.mean(ours) < 0.5 * np.mean(theirs)
    shutil.rmtree(tmp_path)
