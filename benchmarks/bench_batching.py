"""Tokens a second of several answers at once, stepped together, beside the same answers one after the other.

    python benchmarks/bench_batching.py PACKAGE [--threads 1] [--sequences 1 2 4 8] [--tokens 64] [--rounds 5]

Prompts of different lengths (`LENGTHS`) of random tokens, known to the prefix cache, so that only decoding counts; no
guessing. Both ways in turn, medians over the rounds. With one thread the CPU's time is taken, which neighbours hardly
change; else the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import Sampling
from lsp_agent.engine.engine import Engine
from lsp_agent.engine.request import Request

LENGTHS = (900, 150, 420, 1500, 60, 300, 700, 1100)


def decode(engine: Engine, prompts: list[list[int]], tokens: int, together: bool, cpu_time: bool) -> float:
    """Tokens a second."""
    clock = time.process_time if cpu_time else time.perf_counter
    requests = [
        Request(ids, Sampling(max_tokens=tokens), CancelToken(), drafting=False, client=str(index))
        for index, ids in enumerate(prompts)
    ]
    started = clock()
    groups = [requests] if together else [[request] for request in requests]
    for group in groups:
        for request in group:
            engine.submit(request, lambda _: None)
        while engine.scheduler.advance():
            pass
    return len(prompts) * tokens / (clock() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    engine = Engine.load(arguments.package, threads=arguments.threads, context=4096)
    random = np.random.default_rng(1)
    prompts = [random.integers(0, min(engine.config.vocabulary, 150_000), length).tolist() for length in LENGTHS]
    print(f"{arguments.package.name}, {arguments.threads} threads, {arguments.tokens} tokens each; tokens a second")
    print("sequences | one after the other | together | ratio")
    for count in arguments.sequences:
        found: dict[bool, list[float]] = {False: [], True: []}
        for round_ in range(arguments.rounds + 1):  # the first warms up
            for together in (False, True):
                speed = decode(engine, prompts[:count], arguments.tokens, together, arguments.threads == 1)
                if round_:
                    found[together].append(speed)
        one, all_ = (statistics.median(found[together]) for together in (False, True))
        print(f"{count} | {one:.1f} | {all_:.1f} | {all_ / one:.2f}", flush=True)


if __name__ == "__main__":
    main()
