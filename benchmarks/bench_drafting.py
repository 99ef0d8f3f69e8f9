"""What copying is worth: decoding with and without drafts, and with the old text as prediction, interleaved.

    python benchmarks/bench_drafting.py MODEL [--threads 1] [--rounds 3] [--only KIND ...] [--forced] [--json OUT.json]

`MODEL` is an installed model's name, of which three engines are loaded: one decodes plainly, one with drafts and, of
rewrites, one with drafts and `prediction`. They take turns of a few tokens, so that all see the same neighbours, and
change roles after each round, since one may lie better in memory than another.
Greedy. `--forced` replays real text as the sampler's draws, such as the rewrite of an obedient model: so a small
model's whims and loops do not count, while every logit is computed and drafts are verified all the same. Ratios are of
decoded tokens a second to plain decoding, geometric means over the rounds; by wall time and, which with one thread
leaves out what the machine did besides, by the thread's own time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import drafting_tasks
import numpy as np
from drafting_tasks import Task

from lsp_agent.chat_model import Sampling
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.request import Request
from lsp_agent.engine.sampling import Logits, Sampler
from lsp_agent.engine.scheduling import decoding
from lsp_agent.models import store

TURN = 24
"""Tokens that one engine decodes before the next has its turn."""


class Replayed:
    """A sampler that draws what it is told, after looking for the best token as a greedy one does."""

    def __init__(self, prompt: int, target: Sequence[int]) -> None:
        self._prompt, self._target = prompt, target

    def draw(self, logits: Logits, seen: Sequence[int], allowed: np.ndarray | None = None) -> int:  # noqa: ARG002
        logits.top(1)
        return self._target[len(seen) - self._prompt]


class Run:
    """One answer, decoded in turns with others."""

    def __init__(self, engine: Engine, request: Request, target: Sequence[int] | None) -> None:
        """Reads the prompt and draws the first token; `target` is forced if there is one."""
        forced = lambda *_: Replayed(len(request.prompt), target)  # noqa: E731
        decoding.Sampler = forced if target is not None else Sampler  # type: ignore[attr-defined]
        self.generation = engine.submit(request)
        self.tokens = [next(self.generation).token]
        self.wall_s = self.thread_s = 0.0

    def turn(self) -> bool:
        """Decode the next few tokens; False at the end."""
        wall, own = time.perf_counter(), time.thread_time()
        drawn = [step.token for step in itertools.islice(self.generation, TURN)]
        self.wall_s, self.thread_s = self.wall_s + time.perf_counter() - wall, self.thread_s + time.thread_time() - own
        self.tokens += drawn
        return len(drawn) == TURN

    def speed(self, clock: str) -> float:
        """Tokens a second by `wall_s` or `thread_s`."""
        return (len(self.tokens) - 1) / max(getattr(self, clock), 1e-9)


def measure(engines: Sequence[Engine], task: Task, rounds: int, most: int, forced: bool) -> dict[str, Any]:
    plain = engines[0]
    messages = [{"role": "system", "content": drafting_tasks.SYSTEM}, {"role": "user", "content": task.request}]
    prompt = plain.chat_prompt(messages).ids  # type: ignore[arg-type]
    target = plain.tokenizer.encode(task.target)[:most] if forced else None
    sampling = Sampling(max_tokens=len(target) if target is not None else most)
    stops = frozenset() if forced else plain.stop_ids
    modes: dict[str, dict[str, Any]] = {"plain": {"drafting": False}, "drafted": {}}
    if task.source:
        modes["predicted"] = {"prediction": plain.tokenizer.encode(task.source)}
    for engine in engines:
        Run(engine, Request(prompt, Sampling(max_tokens=4)), target).turn()  # reads the prompt
    kept: list[dict[str, Run]] = []
    for turn in range(rounds):
        runs = {}
        for place, (mode, options) in enumerate(modes.items(), turn):
            request = Request(prompt, sampling, stop_ids=stops, **options)
            runs[mode] = Run(engines[place % len(engines)], request, target)
        going = list(runs.values())
        while going:
            going = [run for run in going if run.turn()]
        kept.append(runs)
    first = kept[0]["plain"].tokens
    row: dict[str, Any] = {"task": task.name, "kind": task.kind, "forced": forced, "prompt": len(prompt)}
    row["tokens"] = len(first)
    row["tokens_s"] = statistics.median(runs["plain"].speed("wall_s") for runs in kept)
    for mode in list(modes)[1:]:
        for clock in ("wall_s", "thread_s"):
            ratios = [runs[mode].speed(clock) / runs["plain"].speed(clock) for runs in kept]
            row[f"{mode}_{clock}"] = statistics.geometric_mean(ratios)
        timings = kept[-1][mode].generation.timings
        row[f"{mode}_drafted"], row[f"{mode}_accepted"] = timings.drafted_tokens, timings.accepted_tokens
        pairs = zip(first, kept[0][mode].tokens, strict=False)
        row[f"{mode}_same"] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(first))
    return row


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    cells = [row["task"], row["kind"] + (", forced" if row["forced"] else ""), row["tokens"], f"{row['tokens_s']:.1f}"]
    for mode in ("drafted", "predicted"):
        if f"{mode}_wall_s" in row:
            cells.append(f"{row[f'{mode}_wall_s']:.2f} ({row[f'{mode}_thread_s']:.2f})")
            cells.append(f"{row[f'{mode}_accepted']} of {row[f'{mode}_drafted']}, {row[f'{mode}_same']} alike")
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048, help="most of an answer")
    parser.add_argument("--only", nargs="+", help="names of tasks or kinds")
    parser.add_argument("--forced", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    package = store.resolve(arguments.model).path
    engines = [Engine.load(package, threads=arguments.threads, context=8192) for _ in range(3)]
    tasks = drafting_tasks.rewrites() + drafting_tasks.fresh()
    if arguments.only:
        tasks = [task for task in tasks if {task.name, task.kind} & set(arguments.only)]
    rows = []
    print("| task | kind | tokens | plain, tokens/s | drafts | accepted | with prediction | accepted |")
    print("|---|---|---|---|---|---|---|---|")
    for task in tasks:
        rows.append(measure(engines, task, arguments.rounds, arguments.tokens, arguments.forced))
        show(rows[-1])
    for kind in dict.fromkeys(row["kind"] for row in rows):
        ratios = [statistics.median(row[key] for row in rows if row["kind"] == kind and key in row) for key in
                  ("drafted_wall_s", "drafted_thread_s")]  # fmt: skip
        print(f"{kind}: drafts {ratios[0]:.2f} by wall time, {ratios[1]:.2f} by the thread's (medians)")
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": arguments.model, "threads": arguments.threads, "rows": rows}))


if __name__ == "__main__":
    main()
