"""`lsp-agent bench`: what this machine does with a model, or with random weights in a model's shape."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

from lsp_agent import machine
from lsp_agent.commands.progress import ConsoleProgress, gigabytes
from lsp_agent.commands.quantities import NUMBERS, SIZE, TOKEN_LIST
from lsp_agent.engine import synthetic
from lsp_agent.engine.architecture import ModelConfig
from lsp_agent.engine.benchmark import WARM_UP, Benchmark, Decode, Prefill, timed
from lsp_agent.engine.device import CpuDevice, Device, open_device
from lsp_agent.engine.gpu.bandwidth import measure_machine
from lsp_agent.engine.gpu.choice import Choice, Room, choose
from lsp_agent.engine.gpu.errors import explained
from lsp_agent.engine.gpu.placement import PLACEMENTS, placement_kind
from lsp_agent.engine.gpu.routing_trace import make_trace, router_logits
from lsp_agent.engine.gpu.speed import Machine, Speed, estimate
from lsp_agent.engine.package import Package
from lsp_agent.engine.plan import sizes_of
from lsp_agent.engine.quantisation import SCHEMES, SchemeName
from lsp_agent.engine.session import Decoder
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.models import store
from lsp_agent.models.manifest import find, shipped

TINY = "tiny"
GPU_SHAPE, CPU_SHAPE = "qwen3-coder-next", "qwen2.5-coder-0.5b"
TRACE_TOKENS = 256


@dataclass(frozen=True)
class _Request:
    """The options of the command."""

    model: str | None
    shape: str | None
    scheme: str | None
    layers: int | None
    placement: str | None
    vram: int | None
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    batch: tuple[int, ...]
    tokens: int
    rounds: int
    trace: bool
    threads: int | None
    folder: Path | None


@dataclass(frozen=True)
class _Result:
    """Everything that was found, as JSON shows it."""

    model: str
    scheme: str
    layers: int
    weights: str
    routing: str
    placement: str
    device: str
    load_s: float
    memory_bytes: int
    machine: Machine
    slots: int
    chunk: int | None
    prefill: list[Prefill]
    decode: list[Decode]
    a_token: list[Speed]
    """What the steps of one sequence read after each context, and the speed expected of that."""


@click.command()
@click.option("--model", help="An installed model; by default random weights.")
@click.option("--synthetic", "shape", help=f"Random weights in the shape of a known model, or `{TINY}`.")
@click.option(
    "--scheme", type=click.Choice(list(SCHEMES)), help="Of random weights; by default int4-64 for experts on a GPU."
)
@click.option("--layers", type=click.IntRange(1), help="Of random weights, only so many.")
@click.option("--placement", type=click.Choice(PLACEMENTS), help="By default the fastest that fits.")
@click.option("--vram", type=SIZE, help="Use no more GPU memory than this, such as 24GiB.")
@click.option("--contexts", type=TOKEN_LIST, default="1k,8k", show_default=True, help="Decode after so many tokens.")
@click.option("--prompts", type=TOKEN_LIST, default="512,2048", show_default=True, help="Lengths of prompts to read.")
@click.option("--batch", type=NUMBERS, default="1,4", show_default=True, help="Sequences decoded together.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(1), help="Steps to time.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Times that a prompt is read.")
@click.option("--trace", is_flag=True, help="Route by a synthetic trace in which experts come back as in real text.")
@click.option("--threads", type=click.IntRange(1), help="On the CPU.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="Where random weights are written.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(as_json: bool, **options: Any) -> None:
    """Measure loading, prompts and decoding on this machine; without weights, with random ones in a model's shape.

    Tokens are random, and with random weights so is the routing: hardly any expert is used twice in a row, which
    placements other than resident feel (see --trace).
    """
    wanted = _Request(**options)
    if wanted.model and (wanted.shape or wanted.layers or wanted.scheme):
        raise UserError("--synthetic, --layers and --scheme are for random weights; leave --model out.", ExitCode.USAGE)
    device = CpuDevice() if wanted.placement == "cpu" else open_device("cuda" if wanted.placement else None)
    with _package(wanted, device) as package, ConsoleProgress(Console(stderr=True)) as progress, explained():
        result = _measure(wanted, package, device, progress)
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        _print(result)


@contextmanager
def _package(wanted: _Request, device: Device) -> Iterator[Package]:
    """The installed model, or random weights for as long as they are needed."""
    if wanted.model:
        yield Package(store.resolve(wanted.model).path)
        return
    name = wanted.shape or (GPU_SHAPE if device.name == "cuda" else CPU_SHAPE)
    config = synthetic.with_layers(_config(name), wanted.layers)
    known: SchemeName = "int4-64" if config.experts and device.name == "cuda" else "int4"
    scheme = next((s for s in SCHEMES if s == wanted.scheme), known)
    try:
        if wanted.folder is not None:
            wanted.folder.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix="lsp-agent-bench-", dir=wanted.folder))
    except OSError as error:
        raise UserError(f"Random weights cannot be written ({error}); choose another --folder.") from error
    try:
        yield Package(synthetic.make(made / name, config, scheme))
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _config(name: str) -> ModelConfig:
    if name == TINY:
        return synthetic.TINY
    config = find(name).decoder_config()
    if config is None:
        shapes = ", ".join([*(m.name for m in shipped() if m.config), TINY])
        raise UserError(f"The sizes of {name} are not known; choose one of {shapes}.", ExitCode.USAGE)
    return config


def _choose(wanted: _Request, package: Package, device: Device, context: int) -> Choice:
    if device.name == "cpu":
        reason = "" if wanted.placement == "cpu" else "No GPU can be used (`lsp-agent doctor` says why)."
        return Choice("cpu", None, reason)
    free = min(device.free_memory(), wanted.vram) if wanted.vram else device.free_memory()
    kind = placement_kind(wanted.placement) if wanted.placement else None
    room = Room(free, machine.usable_memory())
    return choose(package, package.path.name, context, room, kind, max(wanted.batch))


def _measure(wanted: _Request, package: Package, device: Device, progress: ConsoleProgress) -> _Result:
    name, random = package.path.name, synthetic.is_synthetic(package.header)
    context = max(*wanted.contexts, *wanted.prompts) + WARM_UP + wanted.tokens
    if context > package.config.context:
        most = package.config.context
        raise UserError(f"{name} has a context of {most} tokens; ask for shorter --contexts.", ExitCode.USAGE)
    choice = _choose(wanted, package, device, context)
    if choice.plan is None:
        device = CpuDevice()
    progress.say(f"{name}: {choice.kind}. {choice.reason}".strip())
    progress.say("Measuring this machine …")
    threads = wanted.threads or machine.default_threads()
    found = measure_machine(_cupy() if device.name == "cuda" else None, threads)
    before = _memory(device)
    progress.say("Loading …")
    placement = choice.plan.placement if choice.plan else None
    decoder, seconds = timed(lambda: Decoder(package, threads, context, "fast", device, None, placement))
    if wanted.trace:
        _follow(decoder, package.config)
    runs = Benchmark(decoder, context, placement.chunk if placement else None)
    read, steps = [], []
    for length in wanted.prompts:
        progress.say(f"Reading {length} tokens …")
        read.append(runs.prefill(length, wanted.rounds))
    for length in wanted.contexts:
        for count in wanted.batch:
            progress.say(f"Decoding {count} at once after {length} tokens …")
            steps.append(runs.decode(length, count, wanted.tokens))
    sizes = sizes_of(package)
    return _Result(
        model=name,
        scheme=str(package.header.get("scheme", "")),
        layers=package.config.layers,
        weights="random" if random else "the model's",
        routing=_routing(package.config, wanted.trace, random),
        placement=choice.kind,
        device=device.name,
        load_s=seconds,
        memory_bytes=_memory(device) - before,
        machine=found,
        slots=placement.slots if placement else 0,
        chunk=placement.chunk if placement else None,
        prefill=read,
        decode=steps,
        a_token=[estimate(choice, sizes, found, step.context, step.hits) for step in steps if step.batch == 1],
    )


def _routing(config: ModelConfig, trace: bool, random: bool) -> str:
    if config.experts is None:
        return "none"
    if trace:
        return "a synthetic trace"
    return "random" if random else "the model's, of random tokens"


def _follow(decoder: Decoder, config: ModelConfig) -> None:
    """Let the decode kernels route by a synthetic trace."""
    experts = config.experts
    if experts is None:
        raise UserError("This model has no experts to route; leave --trace out.")
    try:
        trace = make_trace(TRACE_TOKENS, config.layers, experts.count, experts.used)
    except ValueError as error:
        raise UserError(f"There is no trace for this model: {error}; leave --trace out.") from error
    decoder.follow(router_logits(trace, experts.count))


def _memory(device: Device) -> int:
    """Bytes in use: of the GPU by anyone, or of main memory by this process."""
    if device.name == "cpu":
        return int(psutil.Process().memory_info().rss)
    free, total = _cupy().cuda.runtime.memGetInfo()
    return int(total - free)


def _cupy() -> Any:
    import cupy

    return cupy


def _print(result: _Result) -> None:
    console, found = Console(), result.machine
    scheme = f"{result.scheme}, " if result.scheme else ""
    what = f"{result.model}, {scheme}{result.layers} layers, {result.placement} on {found.name}"
    click.echo(f"{what}; weights: {result.weights}; routing: {result.routing}.")
    memory = f"{found.host / 1e9:.0f} GB/s main memory"
    if result.device == "cuda":
        memory = f"{found.gpu / 1e9:.0f} GB/s GPU memory, {found.bus / 1e9:.0f} GB/s bus, {memory}"
    click.echo(f"Loaded in {result.load_s:.1f} s, {gigabytes(result.memory_bytes)} of memory. Copies: {memory}.\n")
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "ms", "best", "tokens/s", "in slots", "bytes a token", "bandwidth"):
        table.add_column(heading, justify="left" if heading == "run" else "right", no_wrap=True)
    for read in result.prefill:
        table.add_row(f"prompt of {read.tokens}", f"{read.ms:.1f}", f"{read.best_ms:.1f}", f"{read.tokens_s:,.0f}")
    singles = [step.context for step in result.decode if step.batch == 1]
    expected = dict(zip(singles, result.a_token, strict=False))
    for step in result.decode:
        row = [f"decode at {step.context}, batch {step.batch}", f"{step.ms:.2f}", f"{step.best_ms:.2f}"]
        row += [f"{step.tokens_s:,.1f}", "" if step.hits is None else f"{step.hits:.0%}"]
        speed = expected.get(step.context) if step.batch == 1 else None
        if speed is not None:
            row += [_read_bytes(speed), f"{_share(step, speed, found):.0%}"]
        table.add_row(*row)
    console.print(table)
    if not all(step.finite for step in result.decode):
        click.echo("Some logits were no numbers.")


def _read_bytes(speed: Speed) -> str:
    host = f" + {speed.host_bytes / 1e9:.2f} from main memory" if speed.gpu_bytes and speed.host_bytes else ""
    return f"{(speed.gpu_bytes or speed.host_bytes) / 1e9:.2f} GB{host}"


def _share(step: Decode, speed: Speed, found: Machine) -> float:
    """The least time that reading a token's bytes would take, over the time that was taken."""
    least = speed.gpu_bytes / found.gpu + speed.host_bytes / (found.bus if speed.gpu_bytes else found.host)
    return 1000 * least / step.ms
