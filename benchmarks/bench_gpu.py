"""Load time, memory, prefill and decode speed of a package on the GPU.

    python benchmarks/synthetic_package.py /dev/shm/next --scheme mxfp4
    python benchmarks/bench_gpu.py /dev/shm/next [--context 4096] [--prompts 512 2048] [--tokens 128]

Prompts and decoded tokens are random, so that tokens route differently. Medians; one JSON object is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from lsp_agent.engine.device import open_device
from lsp_agent.engine.package import Package
from lsp_agent.engine.session import Decoder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    device = open_device("cuda")
    import cupy

    started = time.perf_counter()
    package = Package(arguments.package)
    decoder = Decoder(package, 4, arguments.context, "fast", device)
    free, total = cupy.cuda.runtime.memGetInfo()
    result = {
        "scheme": package.header["scheme"],
        "layers": package.config.layers,
        "gpu": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(),
        "load_s": round(time.perf_counter() - started, 1),
        "gpu_memory_gb": round((total - free) / 1e9, 2),
    }
    print(json.dumps(result), flush=True)
    random = np.random.default_rng(1)
    vocabulary = package.config.vocabulary
    state = decoder.new_state(arguments.context)
    for length in arguments.prompts:
        times = []
        for _ in range(arguments.rounds + 1):
            state.truncate(0)
            ids = random.integers(0, vocabulary, (1, length))
            started = time.perf_counter()
            decoder.run(ids, state, [length - 1])
            times.append(time.perf_counter() - started)
            state.extend(ids[0].tolist())
        result[f"prefill_{length}_tok_s"] = round(length / statistics.median(times[1:]))
        print(json.dumps(result), flush=True)
    steps = []
    for _ in range(arguments.tokens):
        token = int(random.integers(0, vocabulary))
        started = time.perf_counter()
        (logits,) = decoder.step([token], state)
        logits.top(1)
        steps.append(time.perf_counter() - started)
        state.extend([token])
    finite = bool(np.isfinite(logits.all()).all())
    replays = []
    for _ in range(arguments.tokens):  # the same graph again and again: what a step takes without Python and copies
        started = time.perf_counter()
        state.captured.run()
        device.wait()
        replays.append(time.perf_counter() - started)
    free, total = cupy.cuda.runtime.memGetInfo()
    result |= {
        "graph_replay_ms": round(1000 * statistics.median(replays), 2),
        "decode_tok_s": round(1 / statistics.median(steps), 1),
        "decode_best_tok_s": round(1 / min(steps), 1),
        "first_steps_ms": [round(1000 * step, 1) for step in steps[:4]],
        "finite": finite,
        "gpu_memory_end_gb": round((total - free) / 1e9, 2),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
