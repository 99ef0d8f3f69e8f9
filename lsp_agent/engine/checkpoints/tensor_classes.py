"""The tensors of an import by class: what rounding costs where."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lsp_agent.engine.checkpoints.tensor_reports import TensorReport
from lsp_agent.engine.decoder import EMBEDDING, HEAD

ORDER = (
    "embedding", "attention", "linear attention", "MLP", "experts", "shared expert", "router", "norms and biases",
    "head",
)  # fmt: skip


@dataclass(frozen=True)
class ClassReport:
    """All tensors of a class: how many, their values, source types, what they are carried as, and the error.

    `carried_as` names code widths and blocks, `stored_bits` is the mean of a value with its share of scales.
    `relative_rms_error` is the root of the squared errors over that of the squared values of all tensors together;
    `max_error` is the largest error of a value.
    """

    name: str
    tensors: int
    values: int
    source_types: tuple[str, ...]
    carried_as: tuple[str, ...]
    stored_bits: float
    relative_rms_error: float
    max_error: float


def tensor_class(tensor: TensorReport) -> str:
    """The class of a tensor, by the names of its weight and of itself."""
    part = tensor.weight.rpartition(".")[2]
    if tensor.weight in (EMBEDDING, HEAD):
        return "embedding" if tensor.weight == EMBEDDING else "head"
    if tensor.name.endswith((".bias", "norm", "norm.weight")) and not part.startswith("ssm_"):
        return "norms and biases"
    if part.endswith("_shexp"):
        return "shared expert"
    if part.startswith("experts_"):
        return "experts"
    if part.startswith("ffn_gate_inp"):
        return "router"
    if part.startswith("ssm_"):
        return "linear attention"
    return "attention" if part.startswith("attn_") else "MLP"


def by_class(reports: Iterable[TensorReport]) -> list[ClassReport]:
    """One entry for each class that occurs, in `ORDER`."""
    classes: dict[str, list[TensorReport]] = {}
    for report in reports:
        classes.setdefault(tensor_class(report), []).append(report)
    return [_class(name, classes[name]) for name in ORDER if name in classes]


def _class(name: str, tensors: list[TensorReport]) -> ClassReport:
    energy = sum(t.values * t.rms**2 for t in tensors)
    error = sum(t.values * (t.rms * t.relative_rms_error) ** 2 for t in tensors)
    return ClassReport(
        name=name,
        tensors=len(tensors),
        values=sum(t.values for t in tensors),
        source_types=tuple(sorted({t.source_type for t in tensors})),
        carried_as=tuple(sorted({t.carried_as for t in tensors})),
        stored_bits=sum(t.values * t.stored_bits for t in tensors) / sum(t.values for t in tensors),
        relative_rms_error=math.sqrt(error / energy) if energy else 0.0,
        max_error=max(t.max_error for t in tensors),
    )
