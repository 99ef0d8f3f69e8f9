"""A Python function with a given signature, as a grammar."""

from __future__ import annotations


def function_grammar(signature: str) -> str:
    """Lark of a function that begins with `signature`, `def name(…) -> …:`. Raises `UserError` for another text."""
    raise NotImplementedError(signature)
