"""What copying is worth: decoding with and without drafts, and with the old text as prediction, interleaved.

    python benchmarks/bench_drafting.py MODEL [--threads 1] [--rounds 3] [--only KIND ...] [--forced] [--json OUT.json]

`MODEL` is an installed model's name. Each task's prompt is read once, to warm up; then each round decodes it plainly,
with drafts, and (rewrites) with drafts and `prediction`, one after another, so that all see the same neighbours.
Greedy. `--forced` replays real text as the sampler's draws, such as the rewrite of an obedient model: so a small
model's whims and loops do not count, while every logit is computed and drafts are verified all the same. Ratios are of
decoded tokens a second to the plain run of the same round, medians over the rounds; by wall time and, which with one
thread leaves out what the machine did besides, by the thread's own time.
"""

from __future__ import annotations

import argparse
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
from lsp_agent.engine import decoding
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.request import Request
from lsp_agent.engine.sampling import Logits, Sampler
from lsp_agent.models import store


class Replayed:
    """A sampler that draws what it is told, after looking for the best token as a greedy one does."""

    def __init__(self, prompt: int, target: Sequence[int]) -> None:
        self._prompt, self._target = prompt, target

    def draw(self, logits: Logits, seen: Sequence[int], allowed: np.ndarray | None = None) -> int:  # noqa: ARG002
        logits.top(1)
        return self._target[len(seen) - self._prompt]


def decode(engine: Engine, request: Request, target: Sequence[int] | None) -> dict[str, Any]:
    """One answer; `target` is forced if there is one."""
    forced = lambda *_: Replayed(len(request.prompt), target)  # noqa: E731
    decoding.Sampler = forced if target is not None else Sampler  # type: ignore[attr-defined]
    generation = engine.submit(request)
    tokens = [next(generation).token]  # the prompt is read by now
    wall, own = time.perf_counter(), time.thread_time()
    tokens += [step.token for step in generation]
    wall, own = time.perf_counter() - wall, time.thread_time() - own
    timings = generation.timings
    return {
        "tokens": tokens,
        "wall_s": wall,
        "thread_s": own,
        "drafted": timings.drafted_tokens,
        "accepted": timings.accepted_tokens,
    }


def measure(engine: Engine, task: Task, rounds: int, most: int, forced: bool) -> dict[str, Any]:
    tokenizer = engine.tokenizer
    messages = [{"role": "system", "content": drafting_tasks.SYSTEM}, {"role": "user", "content": task.request}]
    prompt = engine.chat_prompt(messages).ids  # type: ignore[arg-type]
    target = tokenizer.encode(task.target)[:most] if forced else None
    modes: dict[str, dict[str, Any]] = {"plain": {"drafting": False}, "drafted": {}}
    if task.source:
        modes["predicted"] = {"prediction": tokenizer.encode(task.source)}

    def ask(tokens: int, **options: Any) -> dict[str, Any]:
        sampling = Sampling(max_tokens=min(tokens, len(target) if target is not None else most))
        stops = frozenset() if forced else engine.stop_ids
        return decode(engine, Request(prompt, sampling, stop_ids=stops, **options), target)

    ask(8)  # reads the prompt
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    for _ in range(rounds):
        for mode, options in modes.items():
            runs[mode].append(ask(most, **options))
    row: dict[str, Any] = {"task": task.name, "kind": task.kind, "forced": forced, "prompt": len(prompt)}
    plain = runs["plain"]
    row["tokens"] = len(plain[0]["tokens"])
    row["tokens_s"] = statistics.median((len(run["tokens"]) - 1) / run["wall_s"] for run in plain)
    for mode in list(modes)[1:]:
        for clock in ("wall_s", "thread_s"):
            row[f"{mode}_{clock}"] = statistics.median(
                before[clock] / len(before["tokens"]) * len(run["tokens"]) / run[clock]
                for before, run in zip(plain, runs[mode], strict=True)
            )
        row[f"{mode}_drafted"], row[f"{mode}_accepted"] = (runs[mode][-1][key] for key in ("drafted", "accepted"))
        pairs = zip(plain[0]["tokens"], runs[mode][0]["tokens"], strict=False)
        row[f"{mode}_same"] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(plain[0]["tokens"]))
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
    engine = Engine.load(store.resolve(arguments.model).path, threads=arguments.threads, context=8192)
    tasks = drafting_tasks.rewrites() + drafting_tasks.fresh()
    if arguments.only:
        tasks = [task for task in tasks if {task.name, task.kind} & set(arguments.only)]
    rows = []
    print("| task | kind | tokens | plain, tokens/s | drafts | accepted | with prediction | accepted |")
    print("|---|---|---|---|---|---|---|---|")
    for task in tasks:
        rows.append(measure(engine, task, arguments.rounds, arguments.tokens, arguments.forced))
        show(rows[-1])
    for kind in dict.fromkeys(row["kind"] for row in rows):
        ratios = [statistics.median(row[key] for row in rows if row["kind"] == kind and key in row) for key in
                  ("drafted_wall_s", "drafted_thread_s")]  # fmt: skip
        print(f"{kind}: drafts {ratios[0]:.2f} by wall time, {ratios[1]:.2f} by the thread's (medians)")
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": arguments.model, "threads": arguments.threads, "rows": rows}))


if __name__ == "__main__":
    main()
