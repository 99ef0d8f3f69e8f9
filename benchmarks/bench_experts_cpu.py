"""Decoding with a mixture of experts larger than the memory it may use, on the CPU: ours and llama.cpp, interleaved.

    python benchmarks/synthetic_qwen3_next.py 8 syn.gguf --tokenizer QWEN2.5.gguf
    python benchmarks/bench_experts_cpu.py syn.gguf --node-modules DIR --limit-gb 4 [--threads 1] [--tokens 512]

Imports the GGUF file into a package beside it (kept for the next run), packs its experts for this machine, and lets
each engine read the same text token by token, in turns of `--turn` tokens, each in a process and a memory cgroup of
its own. Page cache counts in a cgroup, so `--limit-gb` bounds what is mapped, too; `--limit-gb 0` sets no limit.
Needs a writable memory cgroup (v1) or `systemd-run`. `DIR` holds `node_modules/node-llama-cpp`.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil

HERE = Path(__file__).parent
SOURCE = HERE.parent / "lsp_agent"
CGROUP_V1 = Path("/sys/fs/cgroup/memory")


def own_worker(package: Path, threads: int, context: int) -> None:
    """The same protocol as llama_steps_worker.mjs, over our engine."""
    from lsp_agent.engine.package import Package
    from lsp_agent.engine.session import Decoder

    decoder = Decoder(Package(package), threads, context, "fast")
    state = decoder.new_state(context)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ids = json.loads(line)["ids"]
        started = time.perf_counter()
        for token in ids:
            decoder.run(np.array([[token]], np.int64), state, [0])
            state.extend([token])
        answer = {"seconds": time.perf_counter() - started, "experts": experts_mapped(package)}
        print(json.dumps(answer), flush=True)


def experts_mapped(package: Path) -> int:
    """Routed experts (first projection) that this process has in its page table: those it used and still has."""
    file = next(package.glob("prepacked-*.bin"))
    weights = json.loads(file.with_suffix(".json").read_text())["content"]["weights"]
    count = json.loads((package / "config.json").read_text())["model"]["experts"]["count"]
    blobs = {entry["blobs"][0][0]: entry["blobs"][0][1] for name, entry in weights.items() if "gate_up.codes" in name}
    found = 0
    with Path("/proc/self/maps").open() as maps, Path("/proc/self/pagemap").open("rb") as pagemap:
        for line in maps:
            if str(file) not in line:
                continue
            start, end, offset = (int(part, 16) for part in re.match(r"(\w+)-(\w+) \S+ (\w+)", line).groups())  # type: ignore[union-attr]
            for blob, size in blobs.items():
                if not offset <= blob < offset + end - start:
                    continue
                for expert in range(count):
                    # The middle of an expert is farther from the next than the kernel maps around a fault.
                    address = start + blob - offset + size * (2 * expert + 1) // (2 * count)
                    pagemap.seek(address // mmap.PAGESIZE * 8)
                    found += pagemap.read(8)[7] >> 7  # bit 63: present
    return found


@contextmanager
def limited(command: list[str], name: str, limit: int) -> Iterator[list[str]]:
    """`command` so that it runs in a cgroup of its own with at most `limit` bytes, page cache included; 0: as it is."""
    if not limit:
        yield command
    elif os.access(CGROUP_V1, os.W_OK) and (CGROUP_V1 / "memory.limit_in_bytes").exists():
        group = CGROUP_V1 / f"lsp-agent-bench-{os.getpid()}-{name}"
        group.mkdir()
        try:
            (group / "memory.limit_in_bytes").write_text(str(limit))
            yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
        finally:
            group.rmdir()
    elif shutil.which("systemd-run"):
        scope = ["systemd-run", "--user", "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0"]
        yield [*scope, *command]
    else:
        raise SystemExit("no memory cgroup can be made here: run as root with cgroup v1, or where systemd-run works")


class EndedEarlyError(Exception):
    """A worker is gone: -9 or 137 is the kernel's answer to a process that outgrows its cgroup."""


class Worker:
    def __init__(self, command: list[str], cwd: Path | None = None) -> None:
        started = time.perf_counter()
        self._process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()
        self.load_s = time.perf_counter() - started
        self.loaded = self.memory()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        while not (line := self._process.stdout.readline()).startswith("{"):
            if not line:
                raise EndedEarlyError(f"ended with status {self._process.wait()}")
        return json.loads(line)

    def step(self, ids: list[int]) -> dict[str, Any]:
        assert self._process.stdin
        before = psutil.Process(self._process.pid).io_counters().read_bytes
        self._process.stdin.write(json.dumps({"ids": ids}) + "\n")
        self._process.stdin.flush()
        answer = self._read() | self.memory()
        answer["read_mb"] = (psutil.Process(self._process.pid).io_counters().read_bytes - before) / 1e6
        answer["per_s"] = len(ids) / answer["seconds"]
        return answer

    def memory(self) -> dict[str, float]:
        """Resident memory in MB: its own (`anon`), and mapped files (`file`)."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = {key: int(re.search(rf"Rss{key}:\s+(\d+)", status)[1]) for key in ("Anon", "File")}  # type: ignore[index]
        return {key.lower(): kb * 1024 / 1e6 for key, kb in found.items()}

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


def disk_speed(file: Path) -> dict[str, float]:
    """MB/s of reading 1 GB in a row, and of 200 random pieces of 1 MB, past the page cache."""
    speeds = {}
    random = np.random.default_rng(0)
    places = random.integers(0, file.stat().st_size // 2**20 - 1, 200) * 2**20
    buffer = mmap.mmap(-1, 2**20)
    number = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        for name, offsets in (("sequential", np.arange(1000) * 2**20), ("random 1 MB", places)):
            started = time.perf_counter()
            read = sum(os.preadv(number, [buffer], int(offset)) for offset in offsets)
            speeds[name] = read / 1e6 / (time.perf_counter() - started)
    finally:
        os.close(number)
    return speeds


def forget(*files: Path) -> None:
    """Drop files from the page cache: pages that are there already would be charged to no cgroup of ours."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def prepare(gguf: Path, package: Path) -> None:
    """Import the file and pack its experts, unless that is done."""
    from lsp_agent.engine.checkpoints.importing import import_checkpoint
    from lsp_agent.engine.package import Package
    from lsp_agent.engine.session import Decoder

    if not package.exists():
        started = time.perf_counter()
        import_checkpoint(gguf, package)
        print(f"imported in {time.perf_counter() - started:.0f} s", flush=True)
    started = time.perf_counter()
    Decoder(Package(package), 1, 64, "fast")
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]  # type: ignore[index]
    print(
        f"packed (if it was not) and loaded in {time.perf_counter() - started:.1f} s, "
        f"highest resident memory {int(peak) / 1e6:.2f} GB, mapped files included",
        flush=True,
    )


def text_ids(package: Path, count: int) -> list[int]:
    from lsp_agent.engine.package import Package
    from lsp_agent.engine.tokens import Tokenizer

    text = "".join(path.read_text() for path in sorted(SOURCE.glob("*/*.py")))
    return Tokenizer(Package(package)).encode(text)[:count]


def compare(arguments: argparse.Namespace, package: Path, ids: list[int]) -> dict[str, Any]:
    limit = int(arguments.limit_gb * 1e9)
    context = str(len(ids) + 8)
    own = [sys.executable, __file__, "--worker", str(package), str(arguments.threads), context]
    shutil.copy(HERE / "llama_steps_worker.mjs", arguments.node_modules)
    llama = ["node", "llama_steps_worker.mjs", str(arguments.gguf.resolve()), str(arguments.threads), context]
    rows: dict[str, list[dict[str, Any]]] = {"ours": [], "llama.cpp": []}
    with limited(own, "ours", limit) as own_command, limited(llama, "llama", limit) as llama_command:
        workers: dict[str, Worker] = {}
        for name, command, cwd in (("ours", own_command, None), ("llama.cpp", llama_command, arguments.node_modules)):
            try:
                workers[name] = Worker(command, cwd)
                print(f"{name}: loaded in {workers[name].load_s:.1f} s, MB {workers[name].loaded}", flush=True)
            except EndedEarlyError as error:
                print(f"{name}: {error} while it loaded", flush=True)
        print("tokens | engine | tokens/s | RssAnon MB | RssFile MB | read MB | experts mapped | load", flush=True)
        for start in range(0, len(ids), arguments.turn):
            for name, worker in list(workers.items()):
                try:
                    row = worker.step(ids[start : start + arguments.turn])
                except EndedEarlyError as error:
                    print(f"{name}: {error} while it decoded", flush=True)
                    del workers[name]
                    continue
                rows[name].append(row)
                cells = [f"{row['per_s']:.2f}", *(f"{row[key]:.0f}" for key in ("anon", "file", "read_mb"))]
                cells += [str(row.get("experts", "")), f"{os.getloadavg()[0]:.1f}"]
                print(start + arguments.turn, name, *cells, sep=" | ", flush=True)
        loads = {name: {"load_s": worker.load_s, **worker.loaded} for name, worker in workers.items()}
        for worker in workers.values():
            worker.close()
        time.sleep(0.5)  # until the kernel has emptied the cgroups
    return {"loaded": loads, "rows": rows}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return own_worker(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--node-modules", type=Path, required=True)
    parser.add_argument("--limit-gb", type=float, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--turn", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    package = arguments.gguf.with_suffix(".package").resolve()
    # In a process of its own, so that its memory does not stay with ours.
    code = (
        "import sys; from pathlib import Path; from bench_experts_cpu import prepare; prepare(*map(Path, sys.argv[1:]))"
    )
    subprocess.run([sys.executable, "-c", code, str(arguments.gguf), str(package)], check=True, cwd=HERE)
    prepacked = next(package.glob("prepacked-*.bin"))
    sizes = {path.name: path.stat().st_size / 1e9 for path in (arguments.gguf, package / "weights.bin")}
    sizes["prepacked, on disk"] = prepacked.stat().st_blocks * 512 / 1e9
    speed = disk_speed(arguments.gguf)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, limit {arguments.limit_gb} GB")
    print("GB:", ", ".join(f"{name} {size:.2f}" for name, size in sizes.items()))
    print("disk, MB/s:", ", ".join(f"{name} {value:.0f}" for name, value in speed.items()))
    forget(arguments.gguf, package / "weights.bin", prepacked)
    result = compare(arguments, package, text_ids(package, arguments.tokens))
    half = len(result["rows"]["ours"]) // 2
    rates = {
        name: arguments.turn * len(rows[half:]) / sum(row["seconds"] for row in rows[half:])
        for name, rows in result["rows"].items()
        if rows[half:]
    }
    print("second half, tokens/s:", ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"sizes": sizes, "disk": speed, "rates": rates, **result}, indent=1))
    return None


if __name__ == "__main__":
    main()
