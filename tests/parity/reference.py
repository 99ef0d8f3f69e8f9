"""transformers as a reference: random models in fp32, their logits and how far these can be trusted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_hf import write_tokenizer


def make_reference(
    model_type: str, values: dict[str, Any], seed: int, folder: Path, adjust: Callable[[Any], None] | None = None
):
    """A random model of transformers, changed by `adjust`, saved (in shards) by its own `save_pretrained`."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
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
        if adjust is not None:
            adjust(model)
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
