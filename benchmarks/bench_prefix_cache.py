"""What it costs to bring prompts back from main memory and from disk, beside reading them.

    python benchmarks/bench_prefix_cache.py PACKAGE [--tokens 2000] [--threads 1] [--rounds 5]

Two prompts of random tokens take turns in one state, so each take saves what the state loses, as far as it is not kept
yet, and loads the other. Medians over the rounds; seconds of the clock and of the processor.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lsp_agent.cancel import CancelToken
from lsp_agent.engine.device import open_device
from lsp_agent.engine.gpu.placement import Placement
from lsp_agent.engine.package import Package
from lsp_agent.engine.prefixes.cache import PrefixCache
from lsp_agent.engine.prefixes.disk import open_disk
from lsp_agent.engine.scheduling.prefill import prefill
from lsp_agent.engine.session import Decoder
from lsp_agent.engine.state import State


def timed(work: Callable[[], State | None]) -> tuple[State, float, float]:
    """What `work` gives, and its seconds of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    state = work()
    assert state is not None
    return state, time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    package, device = Package(arguments.package), open_device()
    context = arguments.tokens + 2
    placement = Placement("resident") if device.name == "cuda" else None
    decoder = Decoder(package, arguments.threads, context, "fast", device, placement=placement)
    random = np.random.default_rng(1)
    ids = random.integers(0, min(package.config.vocabulary, 150_000), (2, arguments.tokens)).tolist()
    print(f"{arguments.package.name} on {device.name}, {arguments.tokens} tokens, {arguments.threads} threads")
    print("what | seconds | of the processor | tokens a second | MB a second")

    def row(what: str, seconds: list[tuple[float, float]], size: int) -> None:
        clock, processor = (statistics.median(column) for column in zip(*seconds, strict=True))
        rates = f"{arguments.tokens / clock:.0f} | {size / clock / 1e6:.0f}"
        print(f"{what} | {clock:.3f} | {processor:.3f} | {rates}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["LSP_AGENT_CACHE_DIR"] = folder
        disk = open_disk(arguments.package, device.name, decoder.states, 1 << 40)
        cache = PrefixCache(decoder.states, context, 1, device, 1 << 40, disk)
        took: dict[str, list[tuple[float, float]]] = {"read": [], "saved": [], "swapped": []}
        for turn in range(2 * arguments.rounds + 2):
            prompt = ids[turn % 2]
            state, *seconds = timed(lambda: cache.take([*prompt, 1]))  # noqa: B023
            if turn >= 2:
                took["saved" if turn == 2 else "swapped"].append((seconds[0], seconds[1]))
            else:
                reading = [*prompt, 1][state.length :]
                _, *seconds = timed(lambda: prefill(decoder, state, reading, CancelToken()) is not None and state)  # noqa: B023
                took["read"].append((seconds[0], seconds[1]))
            cache.release(state)
            size = cache.stats().state_bytes
        row("read", took["read"], size)
        row("one saved, the other loaded", took["saved"], size)
        row("loaded from main memory", took["swapped"], size)
        state, *seconds = timed(lambda: cache.close() or state)
        row("both written to files", [(seconds[0], seconds[1])], 2 * size)
        from_disk = []
        for turn in range(arguments.rounds):
            disk = open_disk(arguments.package, device.name, decoder.states, 1 << 40)
            cache = PrefixCache(decoder.states, context, 1, device, 1 << 40, disk)
            state, *seconds = timed(lambda: cache.take([*ids[turn % 2], 1]))  # noqa: B023
            assert state.length >= arguments.tokens
            from_disk.append((seconds[0], seconds[1]))
            cache.close()
        row("loaded from files", from_disk, size)


if __name__ == "__main__":
    main()
