"""Write a manifest for a checkpoint that nobody has described, from what it says about itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lsp_agent.chat_model import Tier
from lsp_agent.engine.fim import QWEN_FIM
from lsp_agent.errors import UserError, one_line
from lsp_agent.models.manifest import Chat, FillInTheMiddle, Manifest, SamplingDefaults

if TYPE_CHECKING:
    from lsp_agent.engine.checkpoints.checkpoint import Checkpoint
    from lsp_agent.engine.checkpoints.gguf_file import GgufFile

TIERS: tuple[tuple[Tier, float], ...] = (("small", 3.5e9), ("medium", 15e9), ("large", float("inf")))
MOST_CHARACTERS = 120
ENDS = ("<|im_end|>", "<|endoftext|>")
LICENCES = {"Apache License": "Apache-2.0", "MIT License": "MIT", "Qwen RESEARCH LICENSE": "qwen-research"}
"""First lines of licence files."""


@dataclass
class _Facts:
    """What both containers say, each in its own way; `has_token` tells whether the vocabulary has a token."""

    title: str
    architecture: str
    context: int
    template: str
    has_token: Callable[[str], bool]
    developer: str = "unknown"
    license: str = "unknown"
    experts: tuple[int, int] | None = None
    """Routed experts, and how many of them a token uses."""
    sampling: Mapping[str, Any] = field(default_factory=dict)


def manifest_of(checkpoint: Checkpoint, name: str | None) -> Manifest:
    """Describe a GGUF file or a Hugging Face folder; `name` overrides its own. Raises `UserError`."""
    from lsp_agent.engine.checkpoints.gguf_file import GgufFile

    path = checkpoint.path
    facts = _of_gguf(checkpoint) if isinstance(checkpoint, GgufFile) else _of_folder(checkpoint)
    total, active = _parameters(checkpoint, facts.experts)
    title = one_line(facts.title)[:MOST_CHARACTERS]
    try:
        return Manifest(
            name=name if name is not None else re.sub(r"[^a-z0-9._]+", "-", title.lower()).strip("-._")[:64],
            title=title,
            developer=one_line(facts.developer)[:MOST_CHARACTERS],
            license=one_line(facts.license)[:MOST_CHARACTERS],
            architecture=facts.architecture,
            parameters=total,
            active_parameters=active,
            tier=next(tier for tier, limit in TIERS if total <= limit),
            context_length=facts.context,
            memory_bytes=sum(file.stat().st_size for file in checkpoint.files()),  # until a package is planned
            chat=_chat(facts),
            fim=_fim(facts),
            sampling=_sampling(facts.sampling),
        )
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        advice = "choose one with --name" if where == "name" else "use a complete checkpoint of the model"
        raise UserError(f"{path} says nothing usable about its {where}; {advice}.") from error


def _parameters(checkpoint: Checkpoint, experts: tuple[int, int] | None) -> tuple[int, int | None]:
    """All, and those that a token uses; a GGUF file's output matrix beside the embedding is not counted, as on cards.

    (Converters write it also where the embedding is tied; nothing in the file says so.)
    """
    from lsp_agent.engine.checkpoints.gguf_file import GgufFile

    left_out = "output.weight" if isinstance(checkpoint, GgufFile) else ""
    sizes = {t.name: t.rows * t.columns for t in checkpoint.tensors.values() if t.name != left_out}
    total = sum(sizes.values())
    if experts is None or not experts[0]:
        return total, None
    routed = sum(size for name, size in sizes.items() if "_exps." in name)
    return total, total - routed + routed * experts[1] // experts[0]


def _chat(facts: _Facts) -> Chat:
    template = facts.template
    return Chat(
        format="chatml" if "<|im_start|>" in template else "checkpoint",
        tool_calls="qwen3_coder" if "<function=" in template else "hermes" if "<tool_call>" in template else "none",
        stop=tuple(token for token in ENDS if facts.has_token(token)),
    )


def _fim(facts: _Facts) -> FillInTheMiddle | None:
    """The tokens, of a model that was trained with them: the vocabularies of plain Qwen models have them as well."""
    present = {kind: token for kind, token in QWEN_FIM.items() if facts.has_token(token)}
    if not {"prefix", "suffix", "middle"} <= present.keys() or "coder" not in facts.title.lower():
        return None
    stop = (*(token for token in ("<|endoftext|>", "<|im_end|>") if facts.has_token(token)), *present.values())
    return FillInTheMiddle(**present, stop=stop)


def _sampling(values: Mapping[str, Any]) -> SamplingDefaults:
    """The makers' recommendation; nothing of it when a number makes no sense."""
    known = {key: values[key] for key in SamplingDefaults.model_fields if values.get(key) is not None}
    try:
        return SamplingDefaults(**known)
    except ValidationError:
        return SamplingDefaults()


def _of_gguf(file: GgufFile) -> _Facts:
    config, tokens = file.config(), file.get("tokenizer.ggml.tokens")
    present = {*QWEN_FIM.values(), *ENDS}.intersection(tokens if isinstance(tokens, list) else ())
    names = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    names["repetition_penalty"] = "penalty_repeat"
    return _Facts(
        title=str(file.get("general.name", file.path.stem)),
        architecture=file.architecture,
        context=config.context,
        template=str(file.get("tokenizer.chat_template", "")),
        has_token=present.__contains__,
        developer=str(file.get("general.organization", file.get("general.author", "unknown"))),
        license=str(file.get("general.license", "unknown")),
        experts=(config.experts.count, config.experts.used) if config.experts else None,
        sampling={ours: file.get(f"general.sampling.{theirs}") for ours, theirs in names.items()},
    )


def _of_folder(checkpoint: Checkpoint) -> _Facts:
    from tokenizers import Tokenizer

    from lsp_agent.engine.checkpoints.tokenizer_import import read_json

    folder, config = checkpoint.path, checkpoint.config()
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises a bare Exception for a missing file and for broken JSON alike
        raise UserError(f"{folder} lacks a readable tokenizer.json; use a complete checkpoint of the model.") from error

    def values(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    card = _card(folder / "README.md")
    developer, title = _names(folder.resolve())
    generation = values("generation_config.json")
    if generation.get("do_sample") is False:
        generation = {}  # greedy
    elif generation.get("do_sample"):
        generation = {"temperature": 1.0, **generation}  # transformers' default
    return _Facts(
        title=title,
        architecture=checkpoint.architecture,
        context=config.context,
        template=_template(folder, values("tokenizer_config.json")),
        has_token=lambda token: tokenizer.token_to_id(token) is not None,
        developer=developer,
        license=card.get("license_name") or card.get("license") or _licence_file(folder),
        experts=(config.experts.count, config.experts.used) if config.experts else None,
        sampling=generation,
    )


def _names(folder: Path) -> tuple[str, str]:
    """Developer and title: those of the repository for a folder in the hub's cache, else the folder's name."""
    if folder.parent.name == "snapshots" and (match := re.match(r"models--(.+?)--(.+)", folder.parents[1].name)):
        return match[1], match[2]
    return "unknown", folder.name


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8", errors="replace")
    template = config.get("chat_template") or ""
    return template if isinstance(template, str) else str(template)  # several, by name


def _card(path: Path) -> dict[str, str]:
    """The plain `key: value` lines of a model card's front matter."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(20_000)
    except OSError:
        return {}
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    return dict(re.findall(r"^(\w+):[ \t]*([^\s#][^\n#]*?)[ \t]*$", head[1], re.MULTILINE)) if head else {}


def _licence_file(folder: Path) -> str:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        try:
            with (folder / name).open(encoding="utf-8", errors="replace") as file:
                begin = file.read(300)
        except OSError:
            continue
        return next((licence for line, licence in LICENCES.items() if line in begin), "unknown")
    return "unknown"
