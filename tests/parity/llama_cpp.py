"""llama.cpp as a reference: node-llama-cpp's prebuilt CPU library, installed by npm, behind JSON lines."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "3.22.1"
FOLDER = Path(__file__).parent.parent.parent / "build" / "parity" / "llama"
WORKER = Path(__file__).parent / "llama_logits.mjs"


class UnavailableError(Exception):
    """Why llama.cpp cannot run here."""


@dataclass(frozen=True)
class Answer:
    """Tokens and the logits [tokens, vocabulary] from which they were chosen."""

    tokens: list[int]
    logits: np.ndarray


def install() -> Path:
    """The folder with node_modules; installs once. Raises `UnavailableError` without npm or when npm fails."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise UnavailableError("npm and node are not installed")
    if not (FOLDER / "node_modules" / "node-llama-cpp").is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        command = [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", f"node-llama-cpp@{VERSION}"]
        machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine())
        if platform.system() == "Linux" and machine:
            # The optional dependencies are libraries for every platform and GPU, over half a gigabyte.
            command += ["--omit=optional", f"@node-llama-cpp/linux-{machine}@{VERSION}"]
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
        if done.returncode:
            raise UnavailableError(f"npm cannot install node-llama-cpp: {done.stderr.strip()[-300:]}")
    shutil.copyfile(WORKER, FOLDER / WORKER.name)  # modules are looked up beside the script
    return FOLDER


class LlamaCpp:
    """A GGUF file in llama.cpp, one thread, everything but quantised weights' activations in fp32."""

    def __init__(self, path: Path, context: int = 512) -> None:
        self._process = subprocess.Popen(
            ["node", WORKER.name, str(path), str(context)],
            cwd=install(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        while not (line := self._process.stdout.readline()).startswith("{"):
            assert line, "llama.cpp refused the file; see its messages above"
        return json.loads(line)

    def greedy(self, ids: Sequence[int], count: int, forced: Sequence[int] | None = None) -> Answer:
        """Decode `count` tokens, the likeliest ones or, whatever their logits, those in `forced`."""
        assert self._process.stdin
        request = {"ids": list(ids), "count": count, "forced": None if forced is None else list(forced)}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return Answer(answer["tokens"], np.array(answer["logits"], np.float32))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
