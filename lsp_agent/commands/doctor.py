"""`lsp-agent doctor`: what this machine has, which model would be used, and why."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lsp_agent import __version__, machine, paths
from lsp_agent.engine.service.runtime import place
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import select, store
from lsp_agent.testing.sandbox import probe


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> int:
    """Say what this machine has and what would be used; exit code 3 when no model could be."""
    report = examine()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _print(report)
    return ExitCode.OK if report["usable"] else ExitCode.ENVIRONMENT


def examine() -> dict[str, Any]:
    """Collect the report; every part of it is plain data."""
    backend = _backend()
    choice = select.choose(store.installed(), store.available_memory())
    runtime = _onnxruntime()
    device, why, wrong_device = ("", "", "") if runtime["problem"] else _device()
    engine = _engine()
    problems = [s for s in (runtime["problem"], wrong_device, engine["problem"], choice.advice) if s]
    name = choice.model.name if choice.model else None
    if backend is not None:  # what this machine lacks does not matter
        problems, name = [backend["problem"]] if backend["problem"] else [], backend["model"]
    return {
        "usable": not problems,
        "problems": problems,
        "model": name,
        "backend": backend,
        "models": [vars(candidate) for candidate in choice.candidates],
        "version": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "onnxruntime": runtime,
        "engine": engine,
        "device": device,
        "device_reason": why,
        "machine": _machine(choice.available_bytes),
        "sandbox": _sandbox(),
        "git": _git(),
        "folders": {
            name: {"path": str(folder), "writable": _writable(folder)}
            for name, folder in (("cache", paths.cache_dir()), ("state", paths.state_dir()))
        },
    }


def _backend() -> dict[str, Any] | None:
    """The model server of the user's settings, and what it says; None where there is none."""
    from lsp_agent.config import load_settings

    backend = load_settings(None).backend
    if backend is None:
        return None
    from lsp_agent.engine.remote.backend import check, key_of

    report: dict[str, Any] = {"url": backend.url, "model": backend.model, "key": "", "problem": ""}
    try:
        report["key"] = key_of(backend)[1]
        found = check(backend)
    except UserError as error:
        return {**report, "problem": str(error)}
    family = found.family.name if found.family else None
    known = {"model": found.name, "server": found.kind, "context_length": found.context_length}
    return {**report, **known, "tier": found.tier, "family": family}


def _onnxruntime() -> dict[str, Any]:
    try:
        import onnxruntime
    except ImportError as error:
        problem = f"ONNX Runtime cannot be loaded ({error}); run `python -m pip install 'lsp-agent[cpu]'`."
        return {"version": None, "providers": [], "gpu": None, "problem": problem}
    providers = list(onnxruntime.get_available_providers())
    # A CUDA build lists its provider on any machine: the GPU counts only when its driver sees one.
    gpu = _nvidia_gpu() if "CUDAExecutionProvider" in providers else None
    return {"version": onnxruntime.__version__, "providers": providers, "gpu": gpu, "problem": ""}


def _engine() -> dict[str, Any]:
    """Whether the process that runs models is there, and what it holds; asks nothing of it."""
    try:
        here = place()
    except UserError as error:
        return {"running": False, "problem": str(error)}
    about = here.about()
    if about is None or about.process is None:
        return {"running": False, "problem": ""}
    return {"running": True, "problem": "", "pid": about.pid, "memory_bytes": about.memory}


def _device() -> tuple[str, str, str]:
    """What the model would run on (`LSP_AGENT_DEVICE`), why not the GPU if that is left open, and why not at all."""
    from lsp_agent.engine.device import open_device, requested_device

    try:
        wanted = requested_device()
        if wanted != "auto":
            return open_device(wanted).name, "", ""
    except UserError as error:
        return os.environ.get("LSP_AGENT_DEVICE", ""), "", str(error)
    try:
        return open_device("cuda").name, "if the model fits", ""
    except UserError as error:
        return "cpu", str(error), ""


def _nvidia_gpu() -> str | None:
    return _first_line("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")


def _machine(available_bytes: int) -> dict[str, Any]:
    cache = paths.cache_dir()
    folder = next(p for p in [cache, *cache.parents] if p.exists())
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": machine.usable_cores(),
        "decoding_threads": machine.default_threads(),
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "available_bytes": available_bytes,
        "disk_free_bytes": shutil.disk_usage(folder).free,
    }


def _sandbox() -> dict[str, Any]:
    report = probe()
    return {"available": report.level == "full", "detail": report.reason, "network_cut": report.network_cut}


def _git() -> str | None:
    return _first_line("git", "--version")


def _first_line(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _about_engine(engine: dict[str, Any]) -> str:
    if not engine["running"]:
        return engine["problem"] or "does not run; starts when needed"
    return f"process {engine['pid']}, {engine['memory_bytes'] / 1e9:.1f} GB; see `lsp-agent engine status`"


def _bracketed(text: str) -> str:
    return escape(f"({text.rstrip('.')})") if text else ""


def _writable(folder: Path) -> bool:
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    return os.access(existing, os.W_OK)


def _told(backend: dict[str, Any]) -> str:
    """What the model server said, and whether it gets a key."""
    key = f"key from the {backend['key']}" if backend["key"] else "no key"
    if "server" not in backend:
        return key
    name = "unknown server" if backend["server"] == "other" else backend["server"]
    return f"{name}, {backend['tier']}, {backend['context_length']:,} tokens, {key}"


def _print(report: dict[str, Any]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    runtime, about = report["onnxruntime"], report["machine"]

    def gigabytes(count: int) -> str:
        return f"{count / 1e9:.1f} GB"

    table.add_row("model", report["model"] or "none")
    if backend := report["backend"]:
        table.add_row("", f"on {backend['url']} ({_told(backend)})")
    for candidate in report["models"]:
        table.add_row("", f"{candidate['name']} ({candidate['tier']}): {candidate['reason']}")
    table.add_row("lsp-agent", f"{report['version']}, Python {report['python']['version']} ({sys.executable})")
    table.add_row("ONNX Runtime", f"{runtime['version'] or 'missing'}: {', '.join(runtime['providers']) or 'nothing'}")
    table.add_row("engine", _about_engine(report["engine"]))
    table.add_row("GPU", runtime["gpu"] or "none that this ONNX Runtime can use")
    table.add_row("device", " ".join(filter(None, (report["device"] or "none", _bracketed(report["device_reason"])))))
    table.add_row("machine", f"{about['system']}, {about['cores']} cores usable, {about['decoding_threads']} to decode")
    table.add_row("memory", f"{gigabytes(about['available_bytes'])} available of {gigabytes(about['memory_bytes'])}")
    table.add_row("disk", f"{gigabytes(about['disk_free_bytes'])} free for models")
    table.add_row("sandbox", report["sandbox"]["detail"])
    table.add_row("git", report["git"] or "not found")
    for name, folder in report["folders"].items():
        table.add_row(f"{name} folder", folder["path"] + ("" if folder["writable"] else " (not writable)"))
    console.print(table)
    for sentence in report["problems"]:
        console.print(f"\n{sentence}", markup=False)
