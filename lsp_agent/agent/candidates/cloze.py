"""Fill-in-the-middle of one span: the cheapest candidates, and the ones small models are best at."""

from __future__ import annotations

import math
from dataclasses import replace

from lsp_agent.agent.candidates import Ask
from lsp_agent.agent.prompts import FileTokens, Problem, View, infill, wrong_hint
from lsp_agent.agent.regions import parse
from lsp_agent.agent.spans import Span
from lsp_agent.chat_model import Sampling

CHARACTERS_PER_TOKEN = 3.0
"""Of Python code, on the low side, so that an answer as long as the span is never cut."""
MARGIN_TOKENS = 24
MOST_TOKENS = {"gap": 48, "body": 320, "group": 160}
MOST_TOKENS_LINE = 80
DROPPED_LINES = 6
"""How many lines an answer may run past its span and still be cut back to something that parses."""


def ask(
    stage: str,
    view: View,
    span: Span,
    problem: Problem | None,
    tokens: FileTokens | None,
    *,
    sampling: Sampling | None = None,
    n: int = 1,
    hinted: bool = False,
) -> Ask:
    """Blank `span` and let the model fill it in."""
    text = view.source.text
    prefix, suffix = infill(view, span, problem, tokens, wrong_hint(span, text) if hinted else "")
    return Ask(
        stage=stage,
        region=view.region,
        line=span.line,
        sampling=replace(sampling or Sampling(), max_tokens=_budget(span), stop=_stops(text, span)),
        build=lambda answer: splice(text, span, answer),
        n=n,
        prefix=prefix,
        suffix=suffix,
    )


def splice(text: str, span: Span, answer: str) -> str | None:
    """Put an answer in the place of its span, cut back to what parses; None when nothing of it does."""
    if span.kind == "gap":
        lines = answer.rstrip().split("\n")
        while lines and not lines[0].strip():
            lines.pop(0)
        if not lines:
            return None
        answer = span.indent + lines[0].lstrip() + "".join("\n" + line for line in lines[1:]) + "\n"
        return _longest(text, span, answer)
    if span.kind == "operator":
        answer = f" {answer.strip()} "
        return text[: span.start] + answer + text[span.end :]
    answer = answer.strip()
    if not answer:
        return _deleted(text, span)
    if "\n" not in span.of(text) and span.kind in ("header", "expression"):
        answer = answer.split("\n")[0].rstrip()
    if span.kind == "header" and not answer.endswith(":"):
        # A header may come back with its block's first statement on the same line, or with a comment.
        head = answer.partition("#")[0].rstrip()
        answer = head if head.endswith(":") else answer
    return _longest(text, span, answer)


def _longest(text: str, span: Span, answer: str) -> str | None:
    """The candidate with as many lines of the answer as parse; the first try when none does, for the gate to refuse."""
    lines = answer.rstrip("\n").split("\n")
    newline = "\n" if answer.endswith("\n") else ""
    for dropped in range(min(DROPPED_LINES, len(lines))):
        kept = "\n".join(lines[: len(lines) - dropped]) + newline
        candidate = text[: span.start] + kept + text[span.end :]
        if parse(candidate) is not None:
            return candidate
    return text[: span.start] + answer + text[span.end :]


def _deleted(text: str, span: Span) -> str | None:
    """An empty answer to a statement deletes it; a block must keep one statement."""
    if span.kind not in ("statement", "group"):
        return None
    line = text.rfind("\n", 0, span.start) + 1
    end = text.find("\n", span.end)
    whole_line = not text[line : span.start].strip() and (end < 0 or not text[span.end : end].strip())
    if whole_line:
        without = text[:line] + ("" if end < 0 else text[end + 1 :])
        if parse(without) is not None:
            return without
    return text[: span.start] + "pass" + text[span.end :]


def _budget(span: Span) -> int:
    most = MOST_TOKENS.get(span.kind, MOST_TOKENS_LINE)
    return min(most, math.ceil((span.end - span.start) / CHARACTERS_PER_TOKEN) + MARGIN_TOKENS)


def _stops(text: str, span: Span) -> tuple[str, ...]:
    """Where an answer ends at the latest: its line for a one-line span, the text that follows for a longer one."""
    if span.kind == "body":
        return ("\ndef ", "\nclass ", "\nif __name__", "<|")
    if span.kind in ("group", "gap") or "\n" in span.of(text):
        following = next((line for line in text[span.end :].split("\n") if len(line.strip()) > 8), "")
        return ("\ndef ", "\nclass ", *(("\n" + following,) if following else ()))
    return ("\n",)
