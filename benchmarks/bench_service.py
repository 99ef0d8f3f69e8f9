"""Throughput and time to first token under load: our engine and llama.cpp's server, same GGUF, interleaved in one run.

    python benchmarks/bench_service.py --llama-server llama-server --gguf MODEL.gguf --model NAME [--threads 1 2]
        [--rounds 3] [--only load turns urgent] [--json OUT.json]

`NAME` is the installed package made of that GGUF. Both servers run throughout, with the same threads and four answers
at once; a round asks one and then the other, so that both see the same neighbours. Both are asked over HTTP on the
loopback, streamed, greedily, and for exactly as many tokens (`ignore_eos`). No prompt is asked twice.

- load: 1, 2 and 4 clients at once, prompts of about 600 tokens, answers of 64.
- turns: four conversations that grow at the same time, by tools' results of about 200 tokens and answers of 32. Tokens
  read again are those of the turn before that the server did not find in its cache (all but the last, which was drawn
  but never read).
- urgent: two long answers, and each second a request at the cursor, answered with 16 tokens; where an answer takes
  longer, the next is asked for after it.

Medians and 95th percentiles over all requests of all rounds. What others did on the machine is measured, too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

SLOTS = 4
CONTEXT = 4096
PROMPT_CHARACTERS, ANSWER = 2150, 64
TURNS, TURN_ANSWER, RESULT_CHARACTERS = 5, 32, 700
LONG_ANSWER, URGENT_ANSWER, URGENT_EVERY_S = 160, 16, 1.0
SYSTEM = {"role": "system", "content": "You are a careful programmer. Answer with code and short explanations."}


@dataclass
class Server:
    """One of the two, running."""

    name: str
    process: psutil.Process
    client: httpx.AsyncClient

    def seconds(self) -> float:
        """Processor time used so far, with that of its children."""
        times = [p.cpu_times() for p in (self.process, *self.process.children(recursive=True))]
        return sum(t.user + t.system for t in times)


@dataclass
class Asked:
    """One request: seconds to the first token and to the end, and what the server counted."""

    first_s: float
    total_s: float
    prompt: int
    cached: int
    completion: int
    message: dict[str, Any] = field(default_factory=dict)


class Texts:
    """Real source code, a different piece each time: the standard library's."""

    def __init__(self) -> None:
        paths = sorted(Path(os.__file__).parent.glob("*.py"))
        self._text = "".join(p.read_text("utf-8", "replace") for p in paths if p.stat().st_size < 60_000)
        self._at = 0

    def take(self, characters: int) -> str:
        """The next piece."""
        self._at = (self._at + characters) % (len(self._text) - characters)
        return self._text[self._at : self._at + characters]


async def ask(server: Server, path: str, body: dict[str, Any]) -> Asked:
    """Ask for a streamed answer and measure it. Raises when the server refuses or the stream breaks off."""
    body = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
    began, first = time.perf_counter(), 0.0
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    usage: dict[str, Any] = {}
    async with server.client.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{server.name}: {response.status_code} {(await response.aread())[:300]!r}")
        async for chunk in _chunks(response):
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or ():
                piece = choice.get("text") or (choice.get("delta") or {}).get("content")
                if piece:
                    first = first or time.perf_counter() - began
                    message["content"] += piece
    total = time.perf_counter() - began
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Asked(first or total, total, usage["prompt_tokens"], cached, usage["completion_tokens"], message)


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                yield json.loads(line[5:])


def chat(messages: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    return {"messages": [SYSTEM, *messages], "max_tokens": tokens, "ignore_eos": True}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def load(server: Server, prompts: list[str]) -> list[Asked]:
    """One request for each of `prompts`, all at once."""
    bodies = [chat([user(f"Explain this code.\n```python\n{prompt}\n```")], ANSWER) for prompt in prompts]
    return await asyncio.gather(*(ask(server, "chat/completions", body) for body in bodies))


async def turns(server: Server, pieces: list[list[str]]) -> list[Asked]:
    """Conversations that grow at the same time; each answer is sent back as it came."""

    async def talk(results: list[str]) -> list[Asked]:
        messages, told = [user(f"Find the bug in this code.\n```python\n{results[0]}\n```")], []
        for result in results[1:]:
            answer = await ask(server, "chat/completions", chat(messages, TURN_ANSWER))
            told.append(answer)
            shown = user(f"Result of read_file:\n```python\n{result}\n```\nGo on.")
            messages = [*messages, answer.message, shown]
        return told

    talks = await asyncio.gather(*(talk(results) for results in pieces))
    for told in talks:
        for before, now in itertools.pairwise(told):
            now.message["again"] = max(0, before.prompt + before.completion - 1 - now.cached)
    return [asked for told in talks for asked in told]


async def urgent(server: Server, prompts: list[str], code: str) -> tuple[list[Asked], list[Asked]]:
    """Two long answers while somebody types: the long ones, and those at the cursor."""
    bodies = [chat([user(f"Explain each line of this code.\n```python\n{p}\n```")], LONG_ANSWER) for p in prompts]
    long = [asyncio.create_task(ask(server, "chat/completions", body)) for body in bodies]
    at = len(code) // 2
    told: list[Asked] = []
    while not any(task.done() for task in long):  # from then on there is less beside them
        at += 3  # what is before the cursor has grown
        pause = asyncio.create_task(asyncio.sleep(URGENT_EVERY_S))
        told.append(await ask(server, "completions", _at_cursor(server, code[:at], code[at:])))
        await pause
    return await asyncio.gather(*long), told


def _at_cursor(server: Server, prefix: str, suffix: str) -> dict[str, Any]:
    body: dict[str, Any] = {"max_tokens": URGENT_ANSWER, "ignore_eos": True}
    if server.name == "lsp-agent":
        return {**body, "prompt": prefix, "suffix": suffix, "priority": -1}
    return {**body, "prompt": f"<|fim_prefix|>{prefix}<|fim_suffix|>{suffix}<|fim_middle|>"}


def _client(url: str, headers: dict[str, str]) -> httpx.AsyncClient:
    """A connection for each request: one that is kept may be closed by the server just when it is used again."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=600, trust_env=False, limits=limits)


@contextlib.contextmanager
def our_server(model: str, threads: int) -> Iterator[Server]:
    """The engine as a process of its own, apart from the user's."""
    program = [sys.executable, "-m", "lsp_agent", "engine"]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        places = {"LSP_AGENT_RUNTIME_DIR": f"{folder}/run", "LSP_AGENT_STATE_DIR": f"{folder}/state"}
        Path(places["LSP_AGENT_RUNTIME_DIR"]).mkdir(mode=0o700)
        environment = {**os.environ, **places}
        command = [*program, "start", "--json", "--tcp", "0", "--threads", str(threads), "--model", model]
        started = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
        report = json.loads(started.stdout)
        headers = {"Authorization": f"Bearer {Path(report['token_file']).read_text().strip()}"}
        try:
            yield Server("lsp-agent", psutil.Process(report["pid"]), _client(report["url"], headers))
        finally:
            subprocess.run([*program, "stop", "--now"], env=environment, check=False, capture_output=True)


@contextlib.contextmanager
def llama_server(binary: str, gguf: Path, threads: int) -> Iterator[Server]:
    """llama.cpp's server with as many slots and threads, and its defaults otherwise."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [binary, "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port), "-np", str(SLOTS)]
    command += ["-c", str(SLOTS * CONTEXT), "-t", str(threads), "-tb", str(threads)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            root = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{root}/health", trust_env=False).status_code == 200:
                        break
                time.sleep(0.1)
            yield Server("llama.cpp", psutil.Process(process.pid), _client(f"{root}/v1", {}))
        finally:
            process.kill()


class Busy:
    """How much of the machine others used while a server was asked: processors' time that neither it nor we used."""

    def __init__(self) -> None:
        self.others: list[float] = []

    @contextlib.contextmanager
    def beside(self, server: Server) -> Iterator[None]:
        def used() -> tuple[float, float]:
            total, ours = psutil.cpu_times(), psutil.Process().cpu_times()
            return time.perf_counter(), sum(total) - total.idle - getattr(total, "iowait", 0.0) - getattr(
                total, "guest", 0.0
            ) - server.seconds() - ours.user - ours.system

        (began, before) = used()
        yield
        (ended, after) = used()
        self.others.append(max(0.0, after - before) / (ended - began))


def spread(values: list[float], digits: int = 2) -> dict[str, float]:
    """Median and 95th percentile."""
    ordered = sorted(values)
    late = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return {"median": round(statistics.median(ordered), digits), "p95": round(late, digits)}


async def measure(servers: list[Server], rounds: int, only: set[str]) -> dict[str, Any]:
    """All scenarios, a round of one server and then of the other; the first of the two changes."""
    texts, busy = Texts(), Busy()
    asked: dict[tuple[str, str], list[Asked]] = {}
    rates: dict[tuple[str, str], list[float]] = {}

    async def run(scenario: str, server: Server, work: Any) -> None:
        began = time.perf_counter()
        with busy.beside(server):
            done = await work
        rest, done = done if isinstance(done, tuple) else ([], done)
        seconds = time.perf_counter() - began
        asked.setdefault((scenario, server.name), []).extend(done)
        rate = sum(one.completion for one in [*rest, *done]) / seconds
        rates.setdefault((scenario, server.name), []).append(rate)
        first = statistics.median(one.first_s for one in done)
        again = sum(one.message.get("again", 0) for one in done)
        print(
            f"  {scenario:<8} {server.name:<10} {seconds:6.1f} s  {rate:5.1f} tokens/s, first token {first:.2f} s, "
            f"{len(done)} requests, {again} tokens read again, others {busy.others[-1]:.2f} cores",
            file=sys.stderr,
            flush=True,
        )

    for server in servers:  # the first request of all pays for memory and caches
        await load(server, [texts.take(PROMPT_CHARACTERS)])
    for number in range(rounds):
        order = servers if number % 2 == 0 else servers[::-1]
        if "load" in only:
            for clients in (1, 2, 4):
                prompts = [texts.take(PROMPT_CHARACTERS) for _ in range(clients)]
                for server in order:
                    await run(f"load {clients}", server, load(server, prompts))
        if "turns" in only:
            pieces = [[texts.take(RESULT_CHARACTERS) for _ in range(TURNS + 1)] for _ in range(SLOTS)]
            for server in order:
                await run("turns", server, turns(server, pieces))
        if "urgent" in only:
            prompts, code = [texts.take(PROMPT_CHARACTERS) for _ in range(2)], texts.take(1200)
            for server in order:
                await run("urgent", server, urgent(server, prompts, code))
    report: dict[str, Any] = {"others_cores": spread(busy.others)}
    for (scenario, name), requests in asked.items():
        again = [one.message["again"] for one in requests if "again" in one.message]
        report.setdefault(scenario, {})[name] = {
            "requests": len(requests),
            "first_token_s": spread([one.first_s for one in requests]),
            "total_s": spread([one.total_s for one in requests]),
            "tokens_per_s": spread(rates[scenario, name], 1),
            "prompt_tokens": spread([one.prompt for one in requests], 0),
            "cached_tokens": sum(one.cached for one in requests),
            **({"read_again": sum(again), "read_again_turns": sum(map(bool, again))} if scenario == "turns" else {}),
        }
    return report


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=["load", "turns", "urgent"], default=["load", "turns", "urgent"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    runs = []
    for threads in given.threads:
        print(f"{given.model}, {threads} threads", file=sys.stderr)
        with (
            our_server(given.model, threads) as ours,
            llama_server(given.llama_server, given.gguf, threads) as theirs,
        ):
            figures = asyncio.run(measure([ours, theirs], given.rounds, set(given.only)))
        runs.append({"model": given.model, "threads": threads, "rounds": given.rounds, **figures})
        show(runs[-1])
    if given.json:
        about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        given.json.write_text(json.dumps({**about, "runs": runs}, indent=2) + "\n", "utf-8")


def show(run: dict[str, Any]) -> None:
    """A row for each scenario and server: median / 95th percentile."""
    others = run["others_cores"]
    print(f"\n{run['model']}, threads {run['threads']}, {run['rounds']} rounds; others used {others['median']} cores")
    print("| scenario | server | first token s | whole answer s | tokens/s | read again |\n|---|---|---|---|---|---|")
    for scenario, by_server in run.items():
        if not isinstance(by_server, dict) or scenario == "others_cores":
            continue
        for name, figures in by_server.items():
            first, total = figures["first_token_s"], figures["total_s"]
            print(
                f"| {scenario} | {name} | {first['median']} / {first['p95']} | {total['median']} / {total['p95']} "
                f"| {figures['tokens_per_s']['median']} | {figures.get('read_again', '')} |"
            )


if __name__ == "__main__":
    main()
