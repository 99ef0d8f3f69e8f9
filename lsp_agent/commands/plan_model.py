"""`lsp-agent model plan`: where a model's bytes would go on a GPU, whether they fit, and what speed to expect."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from lsp_agent import machine
from lsp_agent.commands.progress import gigabytes
from lsp_agent.commands.quantities import SIZE, TOKENS
from lsp_agent.engine import synthetic
from lsp_agent.engine.device import open_device
from lsp_agent.engine.gpu.bandwidth import describe_machine
from lsp_agent.engine.gpu.choice import Choice, Room, choose
from lsp_agent.engine.gpu.placement import PARALLEL, PLACEMENTS, placement_kind
from lsp_agent.engine.gpu.speed import PREFILL_LENGTH, Machine, Speed, estimate
from lsp_agent.engine.package import Package
from lsp_agent.engine.plan import Item, Model, Plan, sizes_of
from lsp_agent.engine.quantisation import SCHEMES, SchemeName
from lsp_agent.errors import UserError
from lsp_agent.models import MAX_CONTEXT, store
from lsp_agent.models.manifest import shipped

PLACES = {"gpu": "GPU memory", "pinned": "page-locked main memory"}
EXPERT_SCHEME: SchemeName = "int4-64"
DENSE_SCHEME: SchemeName = "int4"
"""What models that are not installed are planned in, with experts and without."""
SPEED_AT = 1024


@click.command("plan")
@click.argument("name")
@click.option("--vram", type=SIZE, help="GPU memory to plan for, such as 24GiB; by default what is free.")
@click.option("--ram", type=SIZE, help="Main memory to plan for; by default what can be used.")
@click.option("--context", type=TOKENS, help="Tokens of prompt and answer, such as 64k.")
@click.option("--batch", default=PARALLEL, show_default=True, type=click.IntRange(1, 8), help="Answers at once.")
@click.option("--placement", type=click.Choice(PLACEMENTS), help="By default the fastest that fits.")
@click.option("--scheme", type=click.Choice(list(SCHEMES)), help="For a model that is not installed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    name: str,
    vram: int | None,
    ram: int | None,
    context: int | None,
    batch: int,
    placement: str | None,
    scheme: str | None,
    as_json: bool,
) -> None:
    """Show where the bytes of the model NAME would go on a GPU, and what speed to expect; nothing is loaded.

    NAME is an installed model or any that is listed with its sizes. Experts that do not fit into GPU memory lie in main
    memory, from where the GPU reads them. Exit code 3 when the model does not fit that way either. (`lsp-agent model
    info NAME` says what it takes on the CPU.)
    """
    model, scheme = _model(name, scheme)
    length = min(context or MAX_CONTEXT, model.config.context)
    found, free = _gpu(vram)
    room = Room(free, machine.usable_memory() if ram is None else ram)
    choice = choose(model, name, length, room, placement_kind(placement) if placement else None, batch)
    speed = estimate(choice, sizes_of(model), found, min(SPEED_AT, length))
    if as_json:
        click.echo(json.dumps({"model": name, "scheme": scheme, **_report(choice, room, found, speed)}))
    else:
        _print(name, choice, room, found, speed)
    if choice.plan is None and not placement:
        raise UserError(choice.reason)


def _model(name: str, scheme: str | None) -> tuple[Model, str]:
    """An installed model as it is, or a known one as an import would make it; and its scheme."""
    config = next((m.decoder_config() for m in shipped() if m.name == name), None)
    if config is None or any(m.name == name for m in store.installed()):
        package = Package(store.resolve(name).path)
        return package, package.header.get("scheme", "")
    chosen = next((s for s in SCHEMES if s == scheme), EXPERT_SCHEME if config.experts else DENSE_SCHEME)
    return synthetic.layout(config, chosen), chosen


def _gpu(vram: int | None) -> tuple[Machine, int]:
    """The GPU here with its free memory, or `vram` of it; without a GPU a typical one with that much."""
    try:
        device = open_device("cuda")
    except UserError as error:
        if vram is None:
            raise UserError(
                f"There is no GPU to plan for; say how much memory it would have, as in --vram 24GiB. ({error})"
            ) from error
        return Machine(), vram
    import cupy

    return describe_machine(cupy), device.free_memory() if vram is None else vram


def _report(choice: Choice, room: Room, found: Machine, speed: Speed) -> dict[str, Any]:
    plan = choice.plan
    report: dict[str, Any] = {
        "placement": choice.kind,
        "fits": plan is not None,
        "reason": choice.reason,
        "free": room.gpu,
        "host": room.host,
        "speed": {"estimate": True, **asdict(speed), "length": SPEED_AT, "machine": asdict(found)},
    }
    if plan is None:
        return report
    longest = min(plan.longest_context(room.gpu), plan.sizes.config.context)
    return report | {
        "context": plan.context,
        "batch": plan.batch,
        **{key: getattr(plan.placement, key) for key in ("slots", "chunk", "prompts")},
        "needed": plan.needed,
        "pinned": plan.pinned,
        "longest_context": longest,
        "items": [asdict(item) for item in plan.items],
        "blocks": [_block(plan, index) for index in range(plan.sizes.config.layers)],
    }


def _block(plan: Plan, index: int) -> dict[str, Any]:
    """Bytes of one block of the decoder, by memory: what is split evenly over the blocks that share an item."""
    linear = plan.sizes.config.linear_attention
    shares: dict[str, dict[str, int]] = {"gpu": {}, "pinned": {}}
    for item in plan.items:
        if index in item.blocks:
            dense = item.what.endswith("dense")
            shares[item.where][item.what] = plan.sizes.dense[index] if dense else item.bytes // len(item.blocks)
    kind = "Gated DeltaNet" if linear is not None and index in linear.layers else "attention"
    return {"block": index, "kind": kind, **shares}


def _print(name: str, choice: Choice, room: Room, found: Machine, speed: Speed) -> None:
    plan = choice.plan
    if plan is not None:
        table = Table(box=None, pad_edge=False)
        table.add_column("part")
        table.add_column("size", justify="right")
        table.add_column("blocks", justify="right")
        table.add_column("where")
        for item in plan.items:
            table.add_row(item.what, gigabytes(item.bytes), _shares(item), PLACES[item.where])
        Console().print(table)
        longest = min(plan.longest_context(room.gpu), plan.sizes.config.context)
        click.echo(
            f"{name} needs {gigabytes(plan.needed)} of {gigabytes(room.gpu)} with a context of {plan.context} tokens; "
            f"it fits, with up to {longest}."
        )
        click.echo(f"Placement: {choice.kind}. {choice.reason}".rstrip())
    bandwidths = f"{found.host / 1e9:.0f} GB/s of main memory"
    if plan is not None:
        bandwidths = f"{found.name}, {found.gpu / 1e9:.0f} GB/s of its memory and {found.bus / 1e9:.0f} of the bus"
    click.echo(
        f"Speed (an estimate): decoding at {speed.decode:.0f} tokens/s after {SPEED_AT} tokens, reading a prompt of "
        f"{PREFILL_LENGTH} at {speed.prefill:.0f} tokens/s; a token reads {speed.gpu_bytes / 1e9:.2f} GB of GPU memory "
        f"and {speed.host_bytes / 1e9:.2f} GB of main memory ({bandwidths}, "
        f"{'measured here' if found.measured and plan is not None else 'assumed'})."
    )


def _shares(item: Item) -> str:
    if not item.blocks:
        return ""
    return f"{len(item.blocks)} x {item.bytes / len(item.blocks) / 1e6:.1f} MB"
