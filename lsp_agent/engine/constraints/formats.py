"""Formats of whole answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lsp_agent.chat_model import AnswerFormat
from lsp_agent.engine.constraints import grammar
from lsp_agent.engine.constraints.margin import ending_at_the_margin
from lsp_agent.engine.constraints.python_function import function_grammar
from lsp_agent.engine.constraints.schemas import for_answer, read_schema

if TYPE_CHECKING:
    from lsp_agent.engine.constraints import Constraint
    from lsp_agent.engine.tokens import Tokenizer


def compile_format(answer_format: AnswerFormat, tokenizer: Tokenizer) -> Callable[[], Constraint] | None:
    """Compile what answers must look like; the result makes the constraint of one answer. None for plain text.

    Takes milliseconds, and a second or two the first time for a tokenizer; compiled formats are kept. Thread-safe.
    Raises `UserError` when the format is wrong, too large, or lets no answer through.
    """
    value = answer_format.value
    match answer_format.kind:
        case "text":
            return None
        case "json":
            made, what = grammar.json_schema(for_answer({"type": "object"})), "Any JSON object"
        case "json_schema":
            made, what = grammar.json_schema(for_answer(read_schema(value))), "The JSON schema of the answer"
        case "regex":
            made, what = grammar.regex(value), "The regular expression of the answer"
        case "lark":
            made, what = grammar.lark(value), "The grammar of the answer"
        case "python_function":
            made, what = grammar.lark(function_grammar(value)), "The signature of the answer's function"
            return ending_at_the_margin(grammar.compile_grammar(made, tokenizer, what), tokenizer)
    return grammar.compile_grammar(made, tokenizer, what)
