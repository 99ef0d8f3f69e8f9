"""`lsp-agent model plan`: where an installed model's bytes would go on a GPU, and whether they fit."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from lsp_agent.commands.progress import gigabytes
from lsp_agent.engine.device import open_device
from lsp_agent.engine.package import Package
from lsp_agent.engine.plan import make_plan
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import MAX_CONTEXT, store

PLACES = {"gpu": "GPU memory", "mapped": "file pages"}


def _size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        raise UserError(f"{value!r} is not a size; write it like 24GiB or 24GB.", ExitCode.USAGE) from None


def _tokens(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    digits, thousands = value.removesuffix("k"), value.endswith("k")
    if not digits.isdecimal() or not int(digits):
        raise UserError(f"{value!r} is not a number of tokens; write it like 32768 or 32k.", ExitCode.USAGE)
    return int(digits) * (1024 if thousands else 1)


def _free() -> int:
    try:
        return open_device("cuda").free_memory()
    except UserError as error:
        raise UserError(
            f"There is no GPU to plan for; say how much memory it would have, as in --vram 24GiB. ({error})"
        ) from error


@click.command("plan")
@click.argument("name")
@click.option("--vram", callback=_size, help="GPU memory to plan for, such as 24GiB; by default what is free.")
@click.option("--context", callback=_tokens, help="Tokens of prompt and answer, such as 64k.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str, vram: int | None, context: int | None, as_json: bool) -> None:
    """Show where the bytes of the installed model NAME would go on a GPU, and whether they fit; nothing is loaded.

    Exit code 3 when they do not. (`lsp-agent model info NAME` says what it takes on the CPU.)
    """
    model = store.resolve(name)
    package = Package(model.path)
    length = min(context or MAX_CONTEXT, package.config.context)
    plan = make_plan(package, length)
    free = vram or _free()
    fits, longest = plan.needed <= free, min(plan.longest_context(free), package.config.context)
    if as_json:
        summary = {"needed": plan.needed, "free": free, "fits": fits, "longest_context": longest}
        click.echo(json.dumps(asdict(plan) | summary))
    else:
        table = Table(box=None, pad_edge=False)
        table.add_column("part")
        table.add_column("size", justify="right")
        table.add_column("where")
        for item in plan.items:
            table.add_row(item.what, gigabytes(item.bytes), PLACES[item.where])
        Console().print(table)
        if fits:
            need = f"{name} needs {gigabytes(plan.needed)} of {gigabytes(free)} with a context of {length} tokens"
            click.echo(f"{need}; it fits, with up to {longest}.")
    plan.check(free, name)
