"""A deterministic `ChatModel` that answers from a JSON file: for tests of the loop and of the server, no engine needed.

The file: `{"tier": "small", "rules": [{"on": "infill", "contains": "…", "answers": ["…"], "delay_s": 0.0}]}`. The first
rule whose `on` (chat or infill) matches and whose `contains` is found in the prompt answers; its `answers` are given in
turn, the last one again and again. An infill prompt is `prefix + "<FILL>" + suffix`. No rule: an empty answer.
Where tools are offered, an answer's tool calls are read as a real model's are, in the script's format of `tool_calls`
(`qwen3_coder` unless it says `hermes`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from lsp_agent.cancel import CancelToken
from lsp_agent.chat_model import (
    DEFAULT_OPTIONS,
    ChatOptions,
    Completion,
    Message,
    Sampling,
    Tier,
    TokenScore,
    ToolSchema,
    Usage,
)
from lsp_agent.engine.tool_calls import AnswerReader, ToolCallFormat, new_parser
from lsp_agent.errors import Cancelled, UserError


class ScriptedModel:
    """Implements `ChatModel`; see the module's docstring for the file it reads."""

    def __init__(self, path: Path) -> None:
        try:
            script = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"The model script {path} cannot be read: {error}.") from error
        self.name = f"scripted:{path}"
        self.tier: Tier = script.get("tier", "small")
        self.file_tokens: tuple[str, str] | None = None
        self.context_length: int = script.get("context_length", 32768)
        self._call_format: ToolCallFormat = script.get("tool_calls", "qwen3_coder")
        self._rules = script.get("rules", [])
        self._asked = [0] * len(self._rules)

    def _answer(self, kind: str, prompt: str, cancel: CancelToken) -> str:
        for index, rule in enumerate(self._rules):
            if rule.get("on", kind) == kind and rule.get("contains", "") in prompt:
                if cancel.wait(rule.get("delay_s", 0.0)):
                    raise Cancelled
                answers = rule["answers"]
                text: str = answers[min(self._asked[index], len(answers) - 1)]
                self._asked[index] += 1
                return text
        cancel.raise_if_cancelled()
        return ""

    def _complete(
        self,
        kind: str,
        prompt: str,
        sampling: Sampling,
        cancel: CancelToken,
        n: int,
        tools: Sequence[ToolSchema] = (),
    ) -> list[Completion]:
        completions = []
        for _ in range(n):
            text = self._answer(kind, prompt, cancel)
            for stop in sampling.stop:
                text = text.split(stop, 1)[0]
            reader = AnswerReader(new_parser(self._call_format if tools else "none", tools))
            reader.feed(text)
            reader.close(cut_off=False)
            usage = Usage(prompt_tokens=len(prompt.split()), completion_tokens=len(text.split()))
            completions.append(reader.completion(False, usage, mean_logprob=-0.1))
        return completions

    def chat(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        tools: Sequence[ToolSchema] = (),
        options: ChatOptions = DEFAULT_OPTIONS,  # noqa: ARG002 - a script answers in any case
    ) -> list[Completion]:
        """Answer by the first chat rule found in the joined messages."""
        return self._complete("chat", "\n".join(m["content"] for m in messages), sampling, cancel, n, tools)

    def infill(
        self,
        prefix: str,
        suffix: str,
        sampling: Sampling,
        cancel: CancelToken,
        n: int = 1,
        options: ChatOptions = DEFAULT_OPTIONS,  # noqa: ARG002 - a script answers in any case
    ) -> list[Completion]:
        """Answer by the first infill rule found in `prefix + "<FILL>" + suffix`."""
        return self._complete("infill", f"{prefix}<FILL>{suffix}", sampling, cancel, n)

    def score(self, text: str, cancel: CancelToken) -> list[TokenScore]:
        """Give every word but the first the same probability."""
        cancel.raise_if_cancelled()
        return [TokenScore(m.start(), m.end(), -1.0) for m in re.finditer(r"\S+", text)][1:]

    def close(self) -> None:
        """Nothing to free."""
