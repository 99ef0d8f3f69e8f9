"""Which of a checkpoint's tensors make which weight; whatever does not fit is named in one error."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lsp_agent.engine.architecture import WeightSpec
from lsp_agent.engine.checkpoints.checkpoint import Checkpoint, CheckpointTensor
from lsp_agent.engine.gguf_blocks import SUPPORTED
from lsp_agent.errors import UserError

MOST_NAMED = 5
IGNORED = frozenset({"rope_freqs.weight"})
"""Tables that llama.cpp writes beside the weights and that follow from the config."""


def match_tensors(
    checkpoint: Checkpoint, specs: Sequence[WeightSpec]
) -> list[tuple[WeightSpec, list[CheckpointTensor]]]:
    """Each weight with its tensors.

    Raises one `UserError` that names the tensors that are missing, surplus, misshapen or of unsupported types.
    """
    missing: list[str] = []
    wrong: list[str] = []
    matched: list[tuple[WeightSpec, list[CheckpointTensor]]] = []
    used: set[str] = set()
    for spec in specs:
        names = spec.sources
        if spec.fallback and not any(name in checkpoint.tensors for name in names):
            names = (spec.fallback,)
        used.update(names)
        missing += [name for name in names if name not in checkpoint.tensors]
        tensors = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
        if len(tensors) == len(names):
            wrong += _problems(spec, tensors)
            matched.append((spec, tensors))
    surplus = [name for name in checkpoint.tensors if name not in used | IGNORED]
    complaints = [
        f"{what} {listed(names)}"
        for what, names in (("it lacks", missing), ("it has surplus", surplus), ("misfits:", wrong))
        if names
    ]
    if complaints:
        raise UserError(
            f"{checkpoint.path} does not hold the tensors that its config describes "
            f"({'; '.join(complaints)}); use a complete checkpoint of a supported model."
        )
    return matched


def listed(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _problems(spec: WeightSpec, tensors: Sequence[CheckpointTensor]) -> list[str]:
    unsupported = [f"{t.name} of type {t.type.name}" for t in tensors if t.type not in SUPPORTED]
    if unsupported:
        return unsupported
    rows, columns = math.prod(spec.shape[:-1]), spec.shape[-1]
    if spec.kind == "vector":
        fits = sum(t.rows * t.columns for t in tensors) == rows * columns
    else:
        fits = sum(t.rows for t in tensors) == rows and all(t.columns == columns for t in tensors)
        if spec.kind == "experts":
            fits = fits and len({t.rows for t in tensors}) == 1
    if fits:
        return []
    shapes = " + ".join(f"{t.name} {t.rows} x {t.columns}" for t in tensors)
    return [f"{shapes} instead of {rows} x {columns}"]
