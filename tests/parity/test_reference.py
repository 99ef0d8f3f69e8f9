"""The engine against transformers in fp32, on the same dequantised weights.

`LSP_AGENT_PARITY_GGUF` names one or more GGUF files (separated by the path separator). Needs torch:
`make test-parity` installs it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from prompts import CHATS, GAPS, PLAIN

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.checkpoints.importing import import_checkpoint
from lsp_agent.engine.engine import Engine

pytestmark = [pytest.mark.parity, pytest.mark.timeout(7200)]
TOKENS = 64
NEAR_TIE = 1e-3
CHECKPOINTS = [Path(p) for p in os.environ.get("LSP_AGENT_PARITY_GGUF", "missing.gguf").split(os.pathsep) if p]


@pytest.fixture(scope="module", params=CHECKPOINTS, ids=lambda path: path.stem)
def pair(request, tmp_path_factory):
    import torch
    from transformers import AutoModelForCausalLM

    source: Path = request.param
    package = tmp_path_factory.mktemp("package") / source.stem
    import_checkpoint(source, package)
    reference = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    return Engine.load(package, threads=os.cpu_count(), context=2048, accuracy="exact"), reference.eval()


def all_prompts(engine: Engine) -> list[list[int]]:
    prompts = [engine.tokenizer.encode(text) for text in PLAIN]
    prompts += [engine.chat_prompt([{"role": "user", "content": text}]).ids for text in CHATS]
    return prompts + [engine.infill_prompt(prefix, suffix) for prefix, suffix in GAPS]


def reference_logits(reference, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0].numpy()


def test_greedy_tokens_are_the_reference_s(pair):
    """Decoded step by step; where they part, the reference's two best logits must be within `NEAR_TIE`."""
    engine, reference = pair
    errors, partings = [], []
    prompts = all_prompts(engine)
    for ids in prompts:
        steps = list(engine.generate(ids, Sampling(max_tokens=TOKENS), CancelToken(), stop_ids=()))
        answer = [step.token for step in steps]
        assert len(answer) == TOKENS
        logits = reference_logits(reference, ids + answer[:-1])[len(ids) - 1 :]
        logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprobs -= logits.max(-1, keepdims=True)
        for step, (token, row) in enumerate(zip(answer, logits, strict=True)):
            best = row.max()
            if row.argmax() != token:
                partings.append((ids[:4], step, float(best - row[token])))
                assert best - row[token] < NEAR_TIE, partings
        picked = logprobs[np.arange(TOKENS), answer]
        errors.append(np.abs(picked - [step.logprob for step in steps]).max())
    print(f"\n{len(prompts)} prompts x {TOKENS} tokens: {len(partings)} near ties; max logprob error {max(errors):.2e}")
    assert len(prompts) >= 20
    assert max(errors) < 2e-3


def test_logits_are_the_reference_s(pair):
    engine, reference = pair
    worst = 0.0
    for ids in all_prompts(engine):
        state = engine.prefixes.empty()
        logits = engine._decoder.run(np.array([ids]), state, range(len(ids)))
        engine.prefixes.release(state)
        expected = reference_logits(reference, ids)
        worst = max(worst, float(np.abs(logits - expected).max() / np.abs(expected).max()))
    print(f"\nmax logit error relative to the largest logit: {worst:.2e}")
    assert worst < 1e-4
