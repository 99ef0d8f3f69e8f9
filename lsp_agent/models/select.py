"""Which model is the default: the most capable one that is installed and that the machine can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from lsp_agent.chat_model import Tier
from lsp_agent.models.manifest import InstalledModel, Manifest, shipped


@dataclass(frozen=True)
class Candidate:
    """One installed model, weighed. `reason` says in words why it was or was not chosen."""

    name: str
    tier: Tier
    memory_bytes: int
    fits: bool
    runnable: bool
    chosen: bool
    reason: str


@dataclass(frozen=True)
class Choice:
    """The default model, or None and then `advice`: one sentence with the command to run."""

    model: InstalledModel | None
    available_bytes: int
    candidates: tuple[Candidate, ...]
    advice: str = ""


def choose(models: Sequence[InstalledModel], available_bytes: int) -> Choice:
    """Pick the largest tier that fits into `available_bytes`, in it the model with most parameters."""

    def rank(model: InstalledModel) -> tuple[int, int, str]:
        return get_args(Tier).index(model.manifest.tier), model.manifest.parameters, model.name

    def fits(manifest: Manifest) -> bool:
        return manifest.runnable and manifest.memory_bytes <= available_bytes

    ordered = sorted(models, key=rank, reverse=True)
    best = next((m for m in ordered if fits(m.manifest)), None)
    candidates = tuple(
        Candidate(
            name=model.name,
            tier=model.manifest.tier,
            memory_bytes=model.manifest.memory_bytes,
            fits=model.manifest.memory_bytes <= available_bytes,
            runnable=model.manifest.runnable,
            chosen=model is best,
            reason=_reason(model.manifest, best, model is best, available_bytes),
        )
        for model in ordered
    )
    return Choice(best, available_bytes, candidates, "" if best else _advice(ordered, available_bytes))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"


def _reason(manifest: Manifest, best: InstalledModel | None, chosen: bool, available_bytes: int) -> str:
    if not manifest.runnable:
        return f"this version cannot run the {manifest.architecture} architecture"
    need = f"needs {_gigabytes(manifest.memory_bytes)} of the {_gigabytes(available_bytes)} of memory available"
    if manifest.memory_bytes > available_bytes:
        return need
    if chosen:
        return f"the most capable installed model that fits: {need}"
    assert best is not None
    return f"fits, but {best.name} is more capable"


def _advice(ordered: Sequence[InstalledModel], available_bytes: int) -> str:
    pullable = [m for m in shipped() if m.runnable and m.source and m.source.sha256]
    fitting = [m for m in pullable if m.memory_bytes <= available_bytes]
    names = {m.name for m in ordered}
    if fitting and fitting[-1].name not in names:
        problem = "No model is installed" if not ordered else "No installed model fits this machine's memory"
        return f"{problem}; run `lsp-agent model pull {fitting[-1].name}`."
    smallest = min((m.memory_bytes for m in [*pullable, *(m.manifest for m in ordered)]), default=0)
    return (
        f"Only {_gigabytes(available_bytes)} of memory are available and the smallest model needs "
        f"{_gigabytes(smallest)}; close other programs and try again."
    )
