"""Four editor windows and two command-line runs share one engine for some minutes: errors, starvation, steady memory.

    python benchmarks/soak.py [--minutes 10] [--model qwen2.5-coder-0.5b] [--threads 1] [--json OUT.json]

Each window is a real `lsp-agent serve`, driven over its standard input and output as an editor does, on its own copy
of the example project with a bug of its own: it edits, asks for a fix, and takes back what was changed, over and over.
Each command-line run is `lsp-agent fix --dry-run` in a loop, with another seed each time. A fix that is not found is
no error; whatever is shown as one, an unexpected exit code, and a log with a traceback are. The engine has a runtime
and a state folder of its own. Exit code 1 when the verdict is bad.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "lsp"))

from editor_client import EditorClient  # noqa: E402 - the tests' own editor

BUGS = (
    "page-off-by-one",
    "tax-wrong-variable",
    "merge-lost-quantity",
    "search-price-operator",
    "parse-wrong-constant",
    "percent-rounding",
)
WINDOWS, SAMPLE_EVERY_S = 4, 10.0
RUN_S = 90
"""Most seconds of one fix."""
PATIENCE_S = RUN_S + 120
"""A job that takes longer hangs."""
STARVED_S, STARVED = 60.0, 3.0
"""A request waits too long (the model's work included) from these seconds on, where the longest of most clients' is so
many times shorter: a slow machine starves nobody."""
FAIR, ENOUGH = 0.2, 10
"""Share of the mean number of requests that each client gets at least, once that mean is high enough to judge by."""
GROWTH = 1.15
ERROR = 1
"""`MessageType.Error` of the language server protocol."""


@dataclass
class Client:
    """One window or loop, and what happened to it."""

    name: str
    root: Path
    jobs: int = 0
    green: int = 0
    errors: list[str] = field(default_factory=list)


class Window(EditorClient):
    """An editor that also remembers which messages were errors."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.errors: list[str] = []
        super().__init__(*args, **more)

    def _notified(self, method: str, params: Any) -> None:
        if method == "window/showMessage" and params["type"] == ERROR:
            self.errors.append(params["message"])
        super()._notified(method, params)


def windows_loop(client: Client, environment: dict[str, str], go_on: Callable[[], bool]) -> None:
    """Edit, fix, undo."""
    changed = next(p for p in sorted((client.root / "src").rglob("*.py")) if p.stat().st_size > 400)
    name = changed.relative_to(client.root).as_posix()
    with Window(client.root, environment=environment) as editor:
        editor.open(name)
        first = editor.text(name)
        while go_on():
            editor.replace(name, first[:1], f"# round {client.jobs}\n{first[:1]}")  # another prompt each time
            editor.save(name)
            editor.run("lspAgent.makeGreen")
            editor.wait(lambda: _ended(editor) and editor.messages, PATIENCE_S, "the end of the fix")
            client.jobs += 1
            client.green += any("failed before and pass" in message for message in editor.messages)
            client.errors += editor.errors
            editor.errors.clear()
            if "disabled" not in editor.actions(name).get("source.lspAgent.undo", {"disabled": True}):
                editor.messages.clear()
                editor.run("lspAgent.undo")
                editor.wait(lambda: editor.messages, PATIENCE_S, "the end of undoing")
            editor.messages.clear()
            editor.progress.clear()
            first = editor.text(name)


def _ended(editor: Window) -> bool:
    """Whether every job's progress has ended."""
    return bool(editor.progress) and all(v and v[-1]["kind"] == "end" for v in editor.progress.values())


def command_loop(client: Client, environment: dict[str, str], go_on: Callable[[], bool]) -> None:
    """Fix without changing, with another seed each time."""
    while go_on():
        command = [sys.executable, "-m", "lsp_agent", "fix", str(client.root), "--dry-run", "--json"]
        done = subprocess.run(
            [*command, "--seed", str(client.jobs)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        client.jobs += 1
        try:
            status = json.loads(done.stdout)["status"]
        except (ValueError, KeyError):
            status = "no answer"
        client.green += status == "green"
        if status not in ("green", "not_green") or "Traceback" in done.stderr:
            client.errors.append(f"{status}: {(done.stdout + done.stderr)[-300:]}")


class Watch:
    """Asks the engine for its state now and then."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self.samples: list[dict[str, Any]] = []
        self.errors: list[str] = []

    def status(self) -> dict[str, Any]:
        """What `lsp-agent engine status` says."""
        command = [sys.executable, "-m", "lsp_agent", "engine", "status", "--json"]
        environment = {**os.environ, **self._environment}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            self.errors.append(f"engine status: {done.stderr[-300:]}")
            return {"running": False}
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def sample(self, seconds: float) -> None:
        """Take note of memory, process and queue."""
        said = self.status()
        if not said.get("running"):
            self.samples.append({"t": round(seconds), "pid": 0})
            return
        models = said["models"].values()
        cached = sum(m["cache"]["memory_bytes"] + m["cache"]["state_bytes"] for m in models)
        queued = [m["queue"] for m in models]
        self.samples.append(
            {
                "t": round(seconds),
                "pid": said["pid"],
                "resident": said["memory"]["resident_bytes"],
                "cached": cached,
                "running": sum(q["running"] for q in queued),
                "waiting": sum(q["waiting"] for q in queued),
            }
        )


def asked(state: Path, client: Client) -> dict[str, Any]:
    """What the records of the client's runs say: requests, tokens, and how long each request took."""
    seconds: list[float] = []
    tokens: Counter[str] = Counter()
    for path in (state / "runs").glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if not records or Path(records[0].get("root", "")) != client.root:
            continue
        for record in records:
            if record["kind"] in ("ask", "score"):
                seconds.append(record["seconds"])
                tokens.update({k: v for k, v in record["usage"].items() if isinstance(v, int)})
    ordered = sorted(seconds)
    return {
        "requests": len(seconds),
        **{name: tokens[name] for name in ("prompt_tokens", "cached_tokens", "completion_tokens")},
        "median_s": ordered[len(ordered) // 2] if ordered else 0.0,
        "longest_s": ordered[-1] if ordered else 0.0,
    }


def steady(samples: list[dict[str, Any]]) -> tuple[bool, str]:
    """Whether the engine's memory, less what its cache is meant to hold, stops growing. Judged from 6 samples on."""
    rest = [s["resident"] - s["cached"] for s in samples if s["pid"]]
    if len(rest) < 6:
        return True, "too short to judge"
    third = len(rest) // 3
    before, after = max(rest[third : 2 * third]), max(rest[2 * third :])
    return after <= GROWTH * before, f"{before / 1e6:.0f} MB in the middle third, {after / 1e6:.0f} MB in the last"


def verdict(report: dict[str, Any]) -> list[str]:
    """What is wrong; nothing when all is well."""
    clients, wrong = report["clients"], []
    usual = statistics.median(about["longest_s"] for about in clients.values())
    for name, about in clients.items():
        wrong += [f"{name}: {error}" for error in about["errors"]]
        if about["longest_s"] > max(STARVED_S, STARVED * usual):
            wrong.append(f"{name} waited {about['longest_s']:.0f} s for one request")
    mean = sum(about["requests"] for about in clients.values()) / len(clients)
    wrong += [
        f"{name} made {about['requests']} requests, where the mean is {mean:.0f}"
        for name, about in clients.items()
        if about["requests"] < FAIR * mean and mean >= ENOUGH
    ]
    if not mean:
        wrong.append("nobody asked the engine for anything: it was not tested")
    wrong += report["engine"]["errors"]
    if report["engine"]["restarts"]:
        wrong.append(f"the engine was started {report['engine']['restarts']} times more")
    if not report["engine"]["steady"]:
        wrong.append(f"memory grows: {report['engine']['memory']}")
    return wrong


@contextlib.contextmanager
def guarded(client: Client) -> Iterator[None]:
    """Whatever a client's thread raises is an error of that client."""
    try:
        yield
    except BaseException as error:
        client.errors.append(f"{type(error).__name__}: {str(error)[:600]}")


def soak(folder: Path, minutes: float, model: str, threads: int | None) -> dict[str, Any]:
    """Run all clients and watch the engine, which the first of them starts unless `threads` are asked for."""
    environment = {
        "LSP_AGENT_RUNTIME_DIR": str(folder / "run"),
        "LSP_AGENT_STATE_DIR": str(folder / "state"),
        "LSP_AGENT_MODEL": model,
        "LSP_AGENT_MAX_SECONDS": str(RUN_S),
        "LSP_AGENT_RUN_TESTS_ON_SAVE": "off",
    }
    (folder / "run").mkdir(mode=0o700)
    clients = []
    for number, bug in enumerate(BUGS):
        name = f"window {number + 1}" if number < WINDOWS else f"command {number - WINDOWS + 1}"
        client = Client(name, (folder / name.replace(" ", "-")).resolve())
        maker = [sys.executable, str(ROOT / "examples" / "make_buggy.py"), bug, str(client.root)]
        subprocess.run(maker, check=True, capture_output=True)
        clients.append(client)
    program = [sys.executable, "-m", "lsp_agent", "engine"]
    if threads is not None:
        start = [*program, "start", "--threads", str(threads)]
        subprocess.run(start, env={**os.environ, **environment}, check=True, capture_output=True)
    began = time.monotonic()
    end = began + 60 * minutes

    def work(client: Client) -> None:
        loop = windows_loop if client.name.startswith("window") else command_loop
        with guarded(client):
            loop(client, environment, lambda: time.monotonic() < end)

    threads = [threading.Thread(target=work, args=(client,), name=client.name) for client in clients]
    for thread in threads:
        thread.start()
    watch = Watch(environment)
    while any(thread.is_alive() for thread in threads):
        watch.sample(time.monotonic() - began)
        _show(watch.samples[-1], clients)
        threads[0].join(SAMPLE_EVERY_S)
        if not threads[0].is_alive():
            time.sleep(min(SAMPLE_EVERY_S, max(0.5, end - time.monotonic())))
    subprocess.run([*program, "stop"], env={**os.environ, **environment}, capture_output=True, check=False, timeout=120)
    logs = "".join(p.read_text("utf-8", "replace") for p in (folder / "state" / "logs").glob("*"))
    errors = [f"the engine's log: {line}" for line in logs.splitlines() if " ERROR " in line or "Traceback" in line]
    pids = [s["pid"] for s in watch.samples if s["pid"]]
    is_steady, memory = steady(watch.samples)
    report: dict[str, Any] = {
        "minutes": minutes,
        "model": model,
        "clients": {
            c.name: {"jobs": c.jobs, "green": c.green, "errors": c.errors, **asked(folder / "state", c)}
            for c in clients
        },
        "engine": {
            "restarts": len(dict.fromkeys(pids)) - 1 if pids else 0,
            "steady": is_steady,
            "memory": memory,
            "errors": [*watch.errors, *errors[:10]],
            "samples": watch.samples,
        },
    }
    return {**report, "wrong": verdict(report)}


def _show(sample: dict[str, Any], clients: list[Client]) -> None:
    jobs = ", ".join(f"{c.name}: {c.jobs}" for c in clients)
    memory = f"{sample['resident'] / 1e6:.0f} MB, {sample['cached'] / 1e6:.0f} cached" if sample["pid"] else "no engine"
    queue = f"{sample.get('running', 0)} running, {sample.get('waiting', 0)} waiting"
    print(f"{sample['t']:5d} s  {memory}; {queue}; jobs {jobs}", file=sys.stderr, flush=True)


def main() -> int:
    """Soak, print a table and the verdict, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--threads", type=int, help="Threads of the engine (default: its own choice).")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        report = soak(Path(folder), given.minutes, given.model, given.threads)
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print("| client | fixes (green) | requests | prompt (cached) | answer | median s | longest s | errors |")
    print("|---|---|---|---|---|---|---|---|")
    for name, c in report["clients"].items():
        print(
            f"| {name} | {c['jobs']} ({c['green']}) | {c['requests']} | {c['prompt_tokens']} ({c['cached_tokens']}) "
            f"| {c['completion_tokens']} | {c['median_s']:.2f} | {c['longest_s']:.2f} | {len(c['errors'])} |"
        )
    engine = report["engine"]
    print(f"\nengine: {engine['restarts']} restarts; memory without its cache: {engine['memory']}")
    for sentence in report["wrong"]:
        print(f"WRONG: {sentence}")
    print("verdict: " + ("bad" if report["wrong"] else "good"))
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
