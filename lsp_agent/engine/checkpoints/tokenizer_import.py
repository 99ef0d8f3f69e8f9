"""The vocabulary of a GGUF file, or of a Hugging Face folder, as `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lsp_agent.engine.architectures.config import GgufMetadata
from lsp_agent.engine.fim import QWEN_FIM
from lsp_agent.errors import UserError

SPLIT_PATTERNS = {
    # From the published tokenizer.json of the Qwen2 family; `tokenizer.ggml.pre` names it.
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
}
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def write_gguf_tokenizer(file: GgufMetadata, folder: Path) -> dict[str, Any]:
    """Write both files into `folder`; returns the ids of the special tokens for the package's config.

    Raises `UserError` for a vocabulary of a kind that is not supported.
    """
    model, split = file.require("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    if model != "gpt2" or split not in SPLIT_PATTERNS:
        raise UserError(f"{file.path} has a {model}/{split} vocabulary, which is not supported; use a Qwen checkpoint.")
    tokens, kinds = file.require("tokenizer.ggml.tokens"), file.require("tokenizer.ggml.token_type")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERNS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == TokenType.CONTROL)])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    end = file.get("tokenizer.ggml.eos_token_id")
    ends = {vocabulary[t] for t in END_TOKENS if t in vocabulary} | ({int(end)} if end is not None else set())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": file.get("tokenizer.chat_template"),
        "eos_token": tokens[end] if end is not None else None,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    fim = {name: vocabulary[token] for name, token in QWEN_FIM.items() if token in vocabulary}
    return {"end": sorted(ends), "fim": fim}


def copy_hf_tokenizer(source: Path, folder: Path) -> dict[str, Any]:
    """Copy a Hugging Face folder's tokenizer into `folder`; returns the ids of the special tokens.

    Raises `UserError` when there is no tokenizer.json, it cannot be read, or its vocabulary is of another kind.
    """
    try:
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    except Exception as error:  # tokenizers raises a bare Exception for a missing file and for broken JSON alike
        raise UserError(f"{source} lacks a readable tokenizer.json; use a complete checkpoint of the model.") from error
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if not set(pre_tokenizers.ByteLevel.alphabet()).issuperset(
        "".join(tokenizer.get_vocab(with_added_tokens=False).keys() - added)
    ):
        raise UserError(
            f"{source} has a vocabulary that is not of bytes, which is not supported; use a Qwen checkpoint."
        )
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    config = read_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").exists() else {}
    template = source / "chat_template.jinja"
    if template.exists():
        config["chat_template"] = template.read_text(encoding="utf-8")
    if isinstance(config.get("chat_template"), list):  # of several, by name
        named = {entry["name"]: entry["template"] for entry in config["chat_template"]}
        config["chat_template"] = named.get("default")
    config = {**config, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    generation = source / "generation_config.json"
    listed = (read_json(generation) if generation.exists() else {}).get("eos_token_id")
    ends = set(listed if isinstance(listed, list) else [] if listed is None else [listed])
    ends |= {tokenizer.token_to_id(token) for token in END_TOKENS} - {None}
    fim = {name: tokenizer.token_to_id(token) for name, token in QWEN_FIM.items()}
    return {"end": sorted(ends), "fim": {name: index for name, index in fim.items() if index is not None}}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a Hugging Face folder; raises `UserError` when it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged; use a complete checkpoint of the model.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged; download it again.")
    return values
