"""Prefill and decode speed of our engine and of llama.cpp: same GGUF, same threads, interleaved in one run.

    python benchmarks/bench_cpu.py MODEL.gguf --node-modules DIR [--threads 1 2] [--rounds 5] [--json OUT.json]

`DIR` holds `node_modules/node-llama-cpp` (`npm install --ignore-scripts node-llama-cpp@3.22.1`). Each engine runs in
its own process, loaded throughout; a round asks one for its turn and then the other, so that both see the same
neighbours. Greedy decoding, a prompt of `--prompt` tokens of real source code, medians over the rounds. The code is
that of an example, which stays as it is: of a prompt that changed, greedy tokens and times could not be compared with
those of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
SOURCE = HERE.parent / "examples" / "shopping-basket" / "src" / "shopping_basket"


def own_worker(package: Path, threads: int, context: int) -> None:
    """The same protocol as llama_worker.mjs, over our engine."""
    from lsp_agent.cancel import CancelToken
    from lsp_agent.chat_model import Sampling
    from lsp_agent.engine.engine import Engine

    engine = Engine.load(package, threads=threads, context=context)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        engine.prefixes.clear()
        generation = engine.generate(
            request["ids"],
            Sampling(max_tokens=request["tokens"]),
            CancelToken(),
            stop_ids=(),
            drafting=request["drafting"],
        )
        produced = [step.token for step in generation]
        timings = generation.timings
        answer = {"prefill_s": timings.prefill_s, "decode_s": timings.decode_s, "produced": produced}
        print(json.dumps(answer), flush=True)


class Worker:
    def __init__(self, command: list[str], cwd: Path | None = None) -> None:
        self._process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        while not (line := self._process.stdout.readline()).startswith("{"):
            if not line:
                raise SystemExit("a worker ended early; see its messages above")
        return json.loads(line)

    def ask(self, ids: list[int], tokens: int, drafting: bool = False) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"ids": ids, "tokens": tokens, "drafting": drafting}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def resident_mb(self) -> float:
        """Resident memory now, mapped weights included, in MB."""
        return psutil.Process(self._process.pid).memory_info().rss / 1e6

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


def compare(arguments: argparse.Namespace, package: Path, threads: int, ids: list[int]) -> dict[str, Any]:
    context = str(len(ids) + arguments.tokens + 64)
    shutil.copy(HERE / "llama_worker.mjs", arguments.node_modules)
    workers = {
        "ours": Worker([sys.executable, __file__, "--worker", str(package), str(threads), context]),
        "llama.cpp": Worker(
            ["node", "llama_worker.mjs", str(arguments.gguf.resolve()), str(threads), context], arguments.node_modules
        ),
    }
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    drafted: list[dict[str, Any]] = []
    for worker in workers.values():
        worker.ask(ids[:64], 8)  # warm up
    for _ in range(arguments.rounds):
        for name, worker in workers.items():
            samples[name].append(worker.ask(ids, arguments.tokens))
        drafted.append(workers["ours"].ask(ids, arguments.tokens, drafting=True))
    memory = {name: worker.resident_mb() for name, worker in workers.items()}
    for worker in workers.values():
        worker.close()
    row: dict[str, Any] = {"threads": threads, "load": os.getloadavg()[0]}
    for name, runs in samples.items():
        row[name] = {
            "prefill": len(ids) / statistics.median(run["prefill_s"] for run in runs),
            "decode": (arguments.tokens - 1) / statistics.median(run["decode_s"] for run in runs),
            "resident_mb": memory[name],
            "runs": [{k: run[k] for k in ("prefill_s", "decode_s")} for run in runs],
        }
    row["drafted_decode"] = (arguments.tokens - 1) / statistics.median(run["decode_s"] for run in drafted)
    ours, theirs = (samples[name][0]["produced"] for name in workers)
    row["same_tokens"] = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    return row


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return own_worker(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--node-modules", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from lsp_agent.engine.checkpoints.importing import import_checkpoint
    from lsp_agent.engine.package import Package
    from lsp_agent.engine.tokens import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "package"
        import_checkpoint(arguments.gguf, package)
        text = "".join(path.read_text() for path in sorted(SOURCE.glob("*.py")))
        ids = Tokenizer(Package(package)).encode(text)[: arguments.prompt]
        rows = [compare(arguments, package, threads, ids) for threads in arguments.threads]
    print(f"{arguments.gguf.name}, {platform.machine()}, {os.cpu_count()} cores, prompt {len(ids)}, tokens a second")
    print("threads | prefill ours / llama.cpp = ratio | decode ours / llama.cpp = ratio | resident MB | load")
    for row in rows:
        a, b = row["ours"], row["llama.cpp"]
        cells = [f"{a[k]:.1f} / {b[k]:.1f} = {a[k] / b[k]:.2f}" for k in ("prefill", "decode")]
        print(
            row["threads"], *cells, f"{a['resident_mb']:.0f} / {b['resident_mb']:.0f}", f"{row['load']:.1f}", sep=" | "
        )
        ratio = row["drafted_decode"] / b["decode"]
        print(f"  decode with prompt lookup: {row['drafted_decode']:.1f} = {ratio:.2f}", end="; ")
        print(f"first {row['same_tokens']} greedy tokens alike")
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": arguments.gguf.name, "rows": rows}, indent=1))
    return None


if __name__ == "__main__":
    main()
