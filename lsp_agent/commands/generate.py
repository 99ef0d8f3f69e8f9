"""`lsp-agent generate`: run the model on a prompt, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Message, Sampling, ToolSchema
from lsp_agent.errors import ExitCode, UserError

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option("--model", "name", help="An installed model's name, or the folder of a model package.")
@click.option("--prompt-file", type=_FILE, help="A plain prompt.")
@click.option("--chat-file", type=_FILE, help="A JSON list of messages, as OpenAI's API takes them.")
@click.option("--tools-file", type=_FILE, help="A JSON list of tools, as OpenAI's API takes them, for the chat.")
@click.option("--fim-prefix", type=_FILE, help="The text before the gap.")
@click.option("--fim-suffix", type=_FILE, help="The text after the gap.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0))
@click.option("--top-k", default=0, show_default=True, type=click.IntRange(0))
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--min-p", default=0.0, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", type=int)
@click.option("--stop", multiple=True, help="End the answer before this text; may be repeated.")
@click.option("-n", "count", default=1, show_default=True, type=click.IntRange(1, 32), help="Number of answers.")
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with.")
@click.option("--accuracy", type=click.Choice(["fast", "exact"]), default="fast", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="By default LSP_AGENT_DEVICE, else auto.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of the text.")
def generate(
    name: str | None,
    prompt_file: Path | None,
    chat_file: Path | None,
    tools_file: Path | None,
    fim_prefix: Path | None,
    fim_suffix: Path | None,
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    count: int,
    threads: int | None,
    accuracy: str,
    device: str | None,
    as_json: bool,
) -> None:
    """Run the model on a prompt, a chat, or a gap to fill."""
    fim = fim_prefix is not None or fim_suffix is not None
    if (prompt_file is not None) + (chat_file is not None) + fim != 1:
        raise UserError("Give exactly one of --prompt-file, --chat-file and --fim-prefix/--fim-suffix.", ExitCode.USAGE)
    if tools_file is not None and chat_file is None:
        raise UserError("--tools-file is for a chat; give --chat-file with it.", ExitCode.USAGE)
    from lsp_agent.engine.device import requested_device
    from lsp_agent.engine.engine import Engine
    from lsp_agent.engine.gpu.errors import explained
    from lsp_agent.engine.package import Package
    from lsp_agent.engine.tokens import Tokenizer

    package = _package(name)
    tokenizer = Tokenizer(Package(package))
    if prompt_file:
        ids = tokenizer.encode(_read(prompt_file))
    elif chat_file:
        ids = tokenizer.chat(_messages(chat_file), _tools(tools_file) if tools_file else ()).ids
    else:
        ids = tokenizer.infill(_read(fim_prefix), _read(fim_suffix))
    engine = Engine.load(
        package,
        threads=threads,
        context=len(ids) + max_tokens,  # a GPU sets memory aside for all of it
        accuracy="exact" if accuracy == "exact" else "fast",
        device=requested_device(device),
    )
    sampling = Sampling(max_tokens, temperature, top_k, top_p, min_p, seed=seed, stop=stop)
    generation = engine.generate(ids, sampling, CancelToken(), n=count)
    answers = [{"tokens": [], "text": "", "finish_reason": "length"} for _ in range(count)]
    with explained():
        for step in generation:
            answer = answers[step.index]
            answer["tokens"].append(step.token)  # type: ignore[attr-defined]
            answer["text"] += step.text  # type: ignore[operator]
            answer["finish_reason"] = step.finish_reason or "length"
            if not as_json and count == 1:
                click.echo(step.text, nl=False)
        engine.remember()
    if as_json:
        timings = {k: round(v, 6) for k, v in vars(generation.timings).items()}
        click.echo(json.dumps({"prompt_tokens": ids, "answers": answers, "timings": timings}, ensure_ascii=False))
    elif count > 1:
        click.echo("\n---\n".join(str(answer["text"]) for answer in answers))
    else:
        click.echo()


def _package(name: str | None) -> Path:
    if name is not None and (Path(name) / "config.json").is_file():
        return Path(name)
    from lsp_agent.models import store

    return Path(store.resolve(name).path)


def _read(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.", ExitCode.USAGE) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; give a text file.", ExitCode.USAGE) from error


def _list(path: Path) -> list[Any]:
    """The JSON list in a file; raises `ValueError` for other JSON and for an empty list."""
    values = json.loads(_read(path))
    if not isinstance(values, list) or not values:
        raise ValueError
    return values


def _messages(path: Path) -> list[Message]:
    from lsp_agent.engine.tool_calls import message_from_openai

    try:
        return [message_from_openai(message) for message in _list(path)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path} must hold a JSON list of {{"role": ..., "content": ...}} messages.', ExitCode.USAGE
        ) from error


def _tools(path: Path) -> list[ToolSchema]:
    from lsp_agent.engine.tool_calls import tool_from_openai

    try:
        return [tool_from_openai(tool) for tool in _list(path)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path} must hold a JSON list of {{"type": "function", "function": {{"name": ...}}}} tools.',
            ExitCode.USAGE,
        ) from error
