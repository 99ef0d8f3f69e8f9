"""`lsp-agent model import`: install a checkpoint of the user's, or say what that would do."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lsp_agent import paths
from lsp_agent.commands.progress import ConsoleProgress, experts_beside, gigabytes
from lsp_agent.engine.checkpoints.importing import ImportPlan
from lsp_agent.engine.checkpoints.tensor_classes import by_class
from lsp_agent.engine.quantisation import SCHEMES, SchemeName
from lsp_agent.models import install, store
from lsp_agent.models.identify import identify

EXACT = 1e-6
"""Relative errors below are those of fp32 arithmetic."""


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", help="The name to install it under; by default its known name, or its own.")
@click.option(
    "--scheme",
    type=click.Choice(list(SCHEMES)),
    help="How floating-point matrices are rounded (quantised ones are carried as they are); keep: not at all. Where 4 "
    "bits are asked for, the head, the router and small projections get 8. Default: keep for a quantised checkpoint, "
    "else int4 for more than 3 billion parameters and int8 for fewer.",
)
@click.option("--report", is_flag=True, help="Show how exactly each class of tensors is carried.")
@click.option("--dry-run", is_flag=True, help="Check everything and say what would be installed; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    path: Path, name: str | None, scheme: SchemeName | None, report: bool, dry_run: bool, as_json: bool
) -> None:
    """Install the checkpoint PATH: a GGUF file, or a Hugging Face folder with safetensors.

    An import that was interrupted, even killed, continues when it is started again.
    """
    with ConsoleProgress() as progress:
        result = (_plan if dry_run else _import)(path, name, scheme, report, progress)
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(result["says"])
    if report:
        _print_report(result["report"])


def _import(
    path: Path, name: str | None, scheme: SchemeName | None, report: bool, progress: ConsoleProgress
) -> dict[str, Any]:
    result = install.import_model(path, name, progress, scheme=scheme)
    made, model = result.report, result.model
    built = store.origin(model.path)
    says = f"{model.name} is installed already."
    if made:
        size = gigabytes(made.package_bytes) + experts_beside(made.footprint.prepacked)
        says = f"Installed {model.name} in {model.path}: scheme {made.scheme}, {size}."
    answer = {"name": model.name, "path": str(model.path), "new": result.new, "scheme": built.get("scheme")}
    answer |= {"package_bytes": made.package_bytes if made else model.manifest.package_bytes, "says": says}
    if not report:
        return answer
    if made is None:  # it was installed before: the same errors can be measured again
        return answer | {"report": _measure(ImportPlan(path, built.get("scheme", scheme)), progress)}
    return answer | {"report": [asdict(entry) for entry in by_class(made.tensors)]}


def _plan(
    path: Path, name: str | None, scheme: SchemeName | None, report: bool, progress: ConsoleProgress
) -> dict[str, Any]:
    manifest = identify(path, name, progress)
    plan = ImportPlan(path, scheme)
    plan.check_disk(paths.models_dir())
    footprint = plan.footprint
    if manifest.package_bytes is None:
        manifest = install.sized(manifest, plan.package_bytes, footprint)
    active = f", {manifest.active_parameters / 1e9:.1f}B active" if manifest.active_parameters else ""
    says = (
        f"Would install {manifest.title} as {manifest.name}: {manifest.architecture}, "
        f"{manifest.parameters / 1e9:.2f}B parameters{active}, licence {manifest.license}, {manifest.context_length} "
        f"tokens of context, scheme {plan.scheme}, at most {gigabytes(plan.package_bytes)} on disk"
        f"{experts_beside(footprint.prepacked)}; {gigabytes(manifest.memory_bytes)} of memory on a CPU."
    )
    answer: dict[str, Any] = {"name": manifest.name, "scheme": plan.scheme, "package_bytes": plan.package_bytes}
    answer |= {"manifest": manifest.model_dump(mode="json"), "says": says}
    return answer | ({"report": _measure(plan, progress)} if report else {})


def _measure(plan: ImportPlan, progress: ConsoleProgress) -> list[dict[str, Any]]:
    progress.start("Measuring errors", len(plan.matched))
    return [asdict(entry) for entry in by_class(plan.reports(lambda done, _: progress.update(done)))]


def _print_report(classes: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    columns = (
        "class",
        "tensors",
        "values",
        "source",
        "carried as",
        "bits a value",
        "relative RMS error",
        "largest error",
    )
    for heading in columns:
        table.add_column(heading, justify="left" if heading in ("class", "source", "carried as") else "right")
    for entry in classes:
        exact = entry["relative_rms_error"] < EXACT
        table.add_row(
            entry["name"],
            str(entry["tensors"]),
            f"{entry['values'] / 1e6:.1f}M",
            ", ".join(entry["source_types"]),
            ", ".join(entry["carried_as"]),
            f"{entry['stored_bits']:.2f}",
            "exact" if exact else f"{entry['relative_rms_error']:.2%}",
            "" if exact else f"{entry['max_error']:.2g}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
