"""Write a manifest for a GGUF file that nobody has described, from the file's own header."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lsp_agent.chat_model import Tier
from lsp_agent.errors import UserError
from lsp_agent.models.manifest import QWEN_FIM, Chat, FillInTheMiddle, Manifest, SamplingDefaults

if TYPE_CHECKING:
    from gguf import GGUFReader

TIERS: tuple[tuple[Tier, float], ...] = (("small", 3.5e9), ("medium", 15e9), ("large", float("inf")))


def manifest_of(path: Path, name: str | None) -> Manifest:
    """Describe the GGUF file `path`; `name` overrides the name in its header. Raises `UserError`."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        return _describe(reader, path, name)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path} says nothing usable about its {field}; give a name with --name.") from error
    except (ValueError, KeyError, IndexError, OSError, OverflowError, struct.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not a complete GGUF file ({error}); download it again or convert the model to GGUF first."
        ) from error


def _describe(reader: GGUFReader, path: Path, name: str | None) -> Manifest:
    def text(key: str, default: str) -> str:
        field = reader.get_field(key)
        return str(field.contents()) if field else default

    architecture = text("general.architecture", "")
    title = text("general.name", path.stem)
    context = reader.get_field(f"{architecture}.context_length")
    if not architecture or context is None or not reader.tensors:
        raise ValueError("it holds no model")
    end = max(int(t.data_offset) + int(t.n_bytes) for t in reader.tensors)
    size = path.stat().st_size
    if end > size:
        raise ValueError(f"it should have {end} bytes and has {size}")
    # An output matrix next to its twin, the embedding, is not counted: model cards do not count it either.
    count = sum(int(t.n_elements) for t in reader.tensors if t.name != "output.weight")
    return Manifest(
        name=name if name is not None else re.sub(r"[^a-z0-9._]+", "-", title.lower()).strip("-._")[:64],
        title=title,
        developer=text("general.organization", text("general.author", "unknown")),
        license=text("general.license", "unknown"),
        architecture=architecture,
        parameters=count,
        tier=next(tier for tier, limit in TIERS if count <= limit),
        context_length=int(context.contents()),
        memory_bytes=int(size * 1.5) + 500_000_000,
        chat=Chat(format="chatml" if "<|im_start|>" in text("tokenizer.chat_template", "") else "checkpoint"),
        fim=_fim(reader),
        sampling=SamplingDefaults(),
    )


def _fim(reader: GGUFReader) -> FillInTheMiddle | None:
    field = reader.get_field("tokenizer.ggml.tokens")
    if field is None:
        return None
    wanted = {token.encode() for token in QWEN_FIM.values()}
    present = {part for part in (bytes(field.parts[i]) for i in field.data) if part in wanted}
    if present != wanted:
        return None
    return FillInTheMiddle(**QWEN_FIM, stop=("<|endoftext|>", "<|im_end|>", *QWEN_FIM.values()))
