"""A GGUF file's own vocabulary as `tokenizer.json` and `tokenizer_config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lsp_agent.engine.gguf_file import GgufFile
from lsp_agent.engine.manifest import QWEN_FIM
from lsp_agent.errors import UserError

SPLIT_PATTERNS = {
    # From the published tokenizer.json of the Qwen2 family; `tokenizer.ggml.pre` names it.
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
}
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


def write_tokenizer(file: GgufFile, folder: Path) -> dict[str, Any]:
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
