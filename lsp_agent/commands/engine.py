"""`lsp-agent engine`: the process that runs the models for all windows and runs of this user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lsp_agent.cancel import CancelToken
from lsp_agent.commands.progress import ConsoleProgress
from lsp_agent.engine.service import control_client, launch
from lsp_agent.engine.service.runtime import About, Place, place
from lsp_agent.errors import ExitCode, UserError

DRAIN_S = 30.0


@click.group()
def engine() -> None:
    """Start, stop and inspect the engine that runs the models.

    It starts by itself when something needs it, and ends when nothing does.
    """


@engine.command()
@click.option("--model", help="Load this model at once.")
@click.option("--tcp", "port", metavar="PORT", type=click.IntRange(0, 65535), help="Listen on this loopback port, too.")
@click.option("--package", "packages", metavar="NAME=PATH", multiple=True, help="Serve this package folder as NAME.")
@click.option("--context", type=click.IntRange(512), help="Most tokens of prompt and answer together.")
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with.")
@click.option("--foreground", is_flag=True, help="Run in this terminal until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def start(
    model: str | None,
    port: int | None,
    packages: tuple[str, ...],
    context: int | None,
    threads: int | None,
    foreground: bool,
    as_json: bool,
) -> None:
    """Start the engine, unless it runs already.

    PORT 0 is any free one. Requests to the port need the token that the command names the file of.
    """
    options = [
        f"--{name}={value}"
        for name, value in (("tcp", port), ("context", context), ("threads", threads))
        if value is not None
    ]
    options += [f"--package={_package(named)}" for named in packages]
    if model:
        options.append(f"--default={model}")
    if foreground:
        from lsp_agent.engine.service.process import main

        main([*options, *(["--load"] if model else [])], foreground=True)
        return
    here, cancel = place(), CancelToken()
    new = here.running() is None and launch.start(here, cancel, options)
    about = launch.ensure(here, cancel)
    if not new and options and not (len(options) == 1 and model):
        raise UserError(
            "The engine runs already, with other options; run `lsp-agent engine stop` first.", ExitCode.USAGE
        )
    if model:
        _load(here, about, model)
    report = {"started": new, "pid": about.pid, "socket": str(here.socket), "log": str(here.log)}
    if about.port:
        report |= {"url": f"http://127.0.0.1:{about.port}/v1", "token_file": str(here.token)}
    if as_json:
        click.echo(json.dumps(report))
        return
    click.echo(f"The engine {'runs' if new else 'ran already'} (process {about.pid}).")
    if about.port:
        click.echo(f"API: {report['url']}, with the token in {report['token_file']}")


def _package(named: str) -> str:
    name, found, path = named.partition("=")
    if not found or not name or not path:
        raise UserError(f"{named!r} is not NAME=PATH, such as mine=/models/mine.", ExitCode.USAGE)
    return f"{name}={Path(path).absolute()}"


def _load(here: Place, about: About, model: str) -> None:
    with ConsoleProgress() as progress:
        progress.start(f"Loading {model}", 0)
        total = 0
        for said in control_client.load(here, about, model, None, CancelToken()):
            if "progress" in said:
                done, parts = said["progress"]
                if parts != total:
                    total = parts
                    progress.start(f"Preparing {model} for this machine", total)
                progress.update(done)


@engine.command()
@click.option("--now", is_flag=True, help="Do not finish what it is asked; who asked asks a new engine.")
@click.option(
    "--wait",
    "seconds",
    type=click.FloatRange(0),
    default=DRAIN_S,
    show_default=True,
    help="Most seconds for finishing.",
)
def stop(now: bool, seconds: float) -> None:
    """Stop the engine when its requests are answered, and give its memory back."""
    here = place()
    about = here.about()
    if about is None or launch.gone(about):
        click.echo("The engine does not run.")
        return
    control_client.stop(here, about, now, seconds)
    click.echo("The engine has stopped.")


@engine.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(as_json: bool) -> int:
    """Show whether the engine runs, and its models, memory, cache and queue; exit code 0 in any case."""
    report = examine()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    return ExitCode.OK


def examine() -> dict[str, Any]:
    """The engine's own report; `running` False alone when there is none."""
    here = place()
    about = here.about()
    if about is None or launch.gone(about):
        return {"running": False, "log": str(here.log)}
    said = control_client.status(here, about)
    if said is None:
        raise UserError(
            f"The engine (process {about.pid}) does not answer; see {here.log}, or run `lsp-agent engine stop`."
        )
    return said


def _print(report: dict[str, Any]) -> None:
    if not report["running"]:
        click.echo("The engine does not run; it starts when something needs it, or by `lsp-agent engine start`.")
        return
    console = Console(soft_wrap=True, highlight=False)
    memory = report["memory"]
    about = Table(box=None, show_header=False, pad_edge=False)
    about.add_column(style="bold", no_wrap=True)
    about.add_column(overflow="fold")
    leaving = ", about to leave" if report["stopping"] else ""
    about.add_row(
        "engine", f"process {report['pid']}, version {report['version']}, up {_ago(report['uptime_s'])}{leaving}"
    )
    gpu = f", {_size(memory['gpu_in_use_bytes'])} of GPU memory in use" if memory["gpu_in_use_bytes"] else ""
    about.add_row("memory", f"{_size(memory['resident_bytes'])}{gpu}")
    if report["socket"]:
        about.add_row("socket", escape(report["socket"]))
    if report["port"]:
        about.add_row("API", f"http://127.0.0.1:{report['port']}/v1, token in {escape(report['token_file'])}")
    about.add_row("log", escape(report["log"]))
    for name, progress in report["loading"].items():
        about.add_row("loading", f"{escape(name)}{' {} of {}'.format(*progress) if progress else ''}")
    for name, model in report["models"].items():
        _add_model(about, name, model)
    if not report["models"]:
        about.add_row("models", "none is loaded")
    console.print(about)


def _add_model(table: Table, name: str, model: dict[str, Any]) -> None:
    queue, cache, speed = model["queue"], model["cache"], model["tokens_per_s"]
    table.add_row("model", f"{escape(name)} on {model['placement']}, context {model['context_length']}")
    clients = ", ".join(
        f"{escape(client) or 'unnamed'} {sum(counts.values())}" for client, counts in queue["clients"].items()
    )
    table.add_row(
        "  requests",
        f"{queue['running']} running, {queue['waiting']} waiting{f' ({clients})' if clients else ''}, "
        f"{model['answered']} answered, the last {_ago(model['idle_s'])} ago",
    )
    table.add_row("  speed", f"{speed['prompt']:.0f} tokens/s of prompts, {speed['answer']:.1f} tokens/s of answers")
    found = sum(cache[f"found_{where}"] for where in ("in_states", "in_memory", "on_disk"))
    share = f"{100 * found / cache['asked']:.0f} % of prompts' tokens were known; " if cache["asked"] else ""
    disk = f", {_size(cache['disk_bytes'])} of {_size(cache['disk_limit'])} of disk" if cache["disk_limit"] else ""
    table.add_row(
        "  cache",
        f"{share}{cache['state_tokens']} tokens ready, {_size(cache['state_bytes'])}, and {cache['memory_tokens']} "
        f"in main memory, {_size(cache['memory_bytes'])} of {_size(cache['memory_limit'])}{disk}",
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
