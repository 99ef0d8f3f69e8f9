"""llama.cpp on a GPU with Qwen3-Coder-Next's shape: the peer of `lsp-agent bench --synthetic qwen3-coder-next`.

    benchmarks/gpu/llama_cpp.sh ...                                         # builds llama.cpp into FOLDER
    python benchmarks/synthetic_qwen3_next.py 48 /dev/shm/next.gguf         # 45 GB, random weights in Q4_0
    python benchmarks/gpu/bench_llama_cpp.py FOLDER/bin /dev/shm/next.gguf [--only resident host budget parallel]

One JSON line a result, with the most GPU memory that was in use meanwhile (of the whole card). Tokens are random, as
`llama-bench` draws them. `resident`: everything on the GPU, prefill of 512 and 2048 and decode at depths 0, 1024 and
32768, with micro-batches of 512 (the default) and 2048. `host`: the experts of all layers on the CPU. `budget`: as many
layers' experts on the CPU as leave the card at `--memory-gib`. `parallel`: 1 and 4 sequences at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LAYERS = 48
EXPERT_LAYER_BYTES = 3 * 512 * 512 * 2048 * 18 // 32
"""Experts of one layer in Q4_0: 18 bytes for 32 weights."""


class _PeakMemory:
    """The most GPU memory in use, in bytes, as `nvidia-smi` reports it ten times a second; 0 without a GPU."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=100"]
        try:
            child = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        except OSError:
            yield
            return
        reader = threading.Thread(target=self._read, args=(child,), daemon=True)
        reader.start()
        try:
            yield
        finally:
            child.kill()
            child.wait()
            reader.join()

    def _read(self, child: subprocess.Popen) -> None:
        for line in child.stdout or ():
            if line.strip().isdigit():
                self.bytes = max(self.bytes, int(line) << 20)


def run(label: str, command: list[str], limit: float) -> int:
    """Run a benchmark for at most `limit` seconds, print its results as they come; returns the peak of GPU memory."""
    started, peak, results = time.monotonic(), _PeakMemory(), []
    with peak.watched():
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            output, error = done.stdout, "" if done.returncode == 0 else f"exit {done.returncode}: {done.stderr[-600:]}"
        except subprocess.TimeoutExpired as expired:
            output = (expired.stdout or b"").decode()
            error = f"stopped after {limit:.0f} s"
    for line in output.splitlines():
        if line.startswith("{") and line.endswith("}"):
            results.append(_result(json.loads(line)))
    for result in results:
        _print({"run": label, **result})
    seconds = round(time.monotonic() - started, 1)
    about = {"run": label, "gpu_memory_gb": round(peak.bytes / 1e9, 2), "seconds": seconds}
    _print(about | ({"error": error} if error else {}))
    return peak.bytes


def _result(raw: dict) -> dict:
    if "pl" in raw:  # llama-batched-bench
        return {
            "sequences": raw["pl"],
            "prompt": raw["pp"],
            "prefill_tok_s": round(raw["speed_pp"], 1),
            "decode_tok_s": round(raw["speed_tg"], 2),
        }
    kind = "prefill" if raw["n_prompt"] else "decode"
    best = max(raw["samples_ts"])
    return {
        "test": f"{kind} {raw['n_prompt'] or raw['n_gen']}",
        "depth": raw["n_depth"],
        "tok_s": round(raw["avg_ts"], 2),
        "best_tok_s": round(best, 2),
        "deviation": round(raw["stddev_ts"], 2),
        "micro_batch": raw["n_ubatch"],
        "experts_on_cpu": raw["n_cpu_moe"],
        "threads": raw["n_threads"],
        "gpu": raw["gpu_info"],
    }


def _print(result: dict) -> None:
    print(json.dumps(result), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=Path)
    parser.add_argument("model", type=Path)
    kinds = ["resident", "host", "budget", "parallel"]
    parser.add_argument("--only", nargs="*", default=kinds, choices=[*kinds, "host-prefill", "host-unmapped"])
    parser.add_argument("--memory-gib", type=float, default=24)
    parser.add_argument("--experts-on-cpu", type=int, help="layers for `budget`; by default computed from the memory")
    parser.add_argument("--threads", default=str(os.cpu_count()), help="for experts on the CPU, such as 8,16")
    parser.add_argument("--limit", type=float, default=90, help="seconds for each run")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--quick", action="store_true", help="few tokens, to try the script")
    arguments = parser.parse_args()

    tokens, prompts, depths = ("8", "32,64", "0,128") if arguments.quick else ("128", "512,2048", "0,1024,32768")
    short, depth = ("4", "128") if arguments.quick else ("64", "1024")
    if not arguments.quick:
        devices = [str(arguments.programs / "llama-bench"), "--list-devices"]
        found = subprocess.run(devices, capture_output=True, text=True, timeout=60, check=False)
        if "CUDA0" not in found.stdout + found.stderr:
            raise SystemExit(f"llama.cpp sees no GPU (LD_LIBRARY_PATH?): {found.stdout} {found.stderr[-500:]}")
    bench = [str(arguments.programs / "llama-bench"), "-m", str(arguments.model), "-o", "jsonl", "-fa", "1"]
    bench += ["-ngl", "99"]
    on_cpu = [*bench, "-t", arguments.threads, "-p", "0", "-n", short, "-d", depth, "-r", "2"]
    all_experts = ["-ncmoe", str(arguments.layers)]
    peak = 0
    for kind in arguments.only:
        if kind == "resident":
            command = [*bench, "-p", prompts, "-n", tokens, "-d", depths, "-ub", "512,2048", "-r", "3"]
            peak = run(kind, command, arguments.limit)
        elif kind == "host":
            run(kind, [*on_cpu, *all_experts], arguments.limit)
        elif kind == "host-unmapped":
            run(kind, [*on_cpu, *all_experts, "-lm", "none"], arguments.limit)
        elif kind == "host-prefill":
            prefill = ["-p", prompts.split(",")[-1], "-n", "0", "-ub", "2048", "-r", "1", *all_experts]
            run(kind, [*bench, *prefill], arguments.limit)
        elif kind == "budget":
            layers = arguments.experts_on_cpu
            if layers is None:
                # What the card holds besides experts of layers, at the depth that is run here: about 4 GB.
                room = arguments.memory_gib * 2**30 - (4e9 if not peak else 0)
                resident = peak or arguments.layers * EXPERT_LAYER_BYTES
                layers = min(arguments.layers, max(0, math.ceil((resident - room) / EXPERT_LAYER_BYTES)))
            used = run(f"{kind} {arguments.memory_gib:g} GiB", [*on_cpu, "-ncmoe", str(layers)], arguments.limit)
            free = arguments.memory_gib * 2**30 - used
            if used and arguments.experts_on_cpu is None and not 0 <= free < EXPERT_LAYER_BYTES:
                layers = min(arguments.layers, max(0, layers - math.floor(free / EXPERT_LAYER_BYTES)))
                run(f"{kind} {arguments.memory_gib:g} GiB", [*on_cpu, "-ncmoe", str(layers)], arguments.limit)
        else:
            batched = [str(arguments.programs / "llama-batched-bench"), "-m", str(arguments.model), "-ngl", "99"]
            sizes = ["-npp", depth, "-ntg", tokens, "-npl", "1,4", "-c", "8192", "-ub", "512", "-fa", "on"]
            run(kind, [*batched, *sizes, "--output-format", "jsonl"], arguments.limit)


if __name__ == "__main__":
    main()
