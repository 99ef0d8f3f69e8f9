"""Families of models by name: how each is asked to fill in the middle.

Servers without `suffix` (vLLM above all) are sent the model's own prompt. The orders and tokens are those that the
makers document; for Qwen the prompt is the one that our engine builds (see `Tokenizer.infill`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lsp_agent.engine.fim import QWEN_FIM


@dataclass(frozen=True)
class Family:
    """One family. `prefix`, `suffix` and `middle` stand before those parts; `ends` may end what was filled in."""

    name: str
    pattern: str
    prefix: str
    suffix: str
    middle: str
    repo_name: str | None = None
    file_sep: str | None = None
    ends: tuple[str, ...] = ()

    @property
    def file_tokens(self) -> tuple[str, str] | None:
        """As `ChatModel.file_tokens`."""
        return (self.repo_name, self.file_sep) if self.repo_name and self.file_sep else None

    def infill_prompt(self, prefix: str, suffix: str) -> str:
        """The text that asks for what belongs between; the files in front of `prefix` stay in front of all.

        A server reads control tokens wherever they are spelled out, so in the code itself they are spelled otherwise.
        """
        end = 0
        if self.file_sep:
            for found in re.finditer(rf"^{re.escape(self.file_sep)}.*\n", prefix, re.MULTILINE):
                end = found.end()
        files, code = prefix[:end], prefix[end:]
        return "".join(
            (self._spelled(files), self.prefix, self._spelled(code), self.suffix, self._spelled(suffix), self.middle)
        )

    def _spelled(self, text: str) -> str:
        for token in (self.prefix, self.suffix, self.middle):
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text


QWEN = Family(
    "qwen",
    r"qwen.*coder|coder.*qwen",
    QWEN_FIM["prefix"],
    QWEN_FIM["suffix"],
    QWEN_FIM["middle"],
    QWEN_FIM["repo_name"],
    QWEN_FIM["file_sep"],
    ("<|endoftext|>", "<|im_end|>", *QWEN_FIM.values()),
)
STARCODER = Family(
    "starcoder",
    r"starcoder|granite.*code",
    "<fim_prefix>",
    "<fim_suffix>",
    "<fim_middle>",
    "<repo_name>",
    "<file_sep>",
    ("<|endoftext|>", "<file_sep>", "<repo_name>", "<fim_prefix>"),
)
DEEPSEEK = Family(
    "deepseek-coder",
    r"deepseek.*coder",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
    ends=("<｜end▁of▁sentence｜>",),
)
CODEGEMMA = Family(
    "codegemma",
    r"codegemma",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    ends=("<|file_separator|>", "<eos>"),
)
FAMILIES = {family.name: family for family in (QWEN, STARCODER, DEEPSEEK, CODEGEMMA)}


def family_of(model: str) -> Family | None:
    """Tell a model's family by its name; None where the name says nothing of filling in the middle."""
    return next((family for family in FAMILIES.values() if re.search(family.pattern, model.lower())), None)
