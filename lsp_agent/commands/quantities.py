"""Sizes and numbers of tokens as options: 24GiB, 64k."""

from __future__ import annotations

import click
from pydantic import ByteSize, TypeAdapter, ValidationError

from lsp_agent.errors import ExitCode, UserError

MOST_TOGETHER = 8
"""Sequences that can be decoded together."""


class _Size(click.ParamType):
    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ARG002
        """Bytes of a size such as 24GiB or 24GB; raises `UserError`."""
        try:
            return int(TypeAdapter(ByteSize).validate_python(value))
        except ValidationError:
            raise UserError(f"{value!r} is not a size; write it like 24GiB or 24GB.", ExitCode.USAGE) from None


class _Tokens(click.ParamType):
    name = "tokens"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:  # noqa: ARG002
        """A number of tokens such as 32768 or 32k; raises `UserError`."""
        text = str(value)
        digits, thousands = text.removesuffix("k"), text.endswith("k")
        if not digits.isdecimal() or not int(digits):
            raise UserError(f"{text!r} is not a number of tokens; write it like 32768 or 32k.", ExitCode.USAGE)
        return int(digits) * (1024 if thousands else 1)


class _TokenList(click.ParamType):
    name = "tokens,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Numbers of tokens separated by commas; raises `UserError`."""
        if isinstance(value, tuple):
            return value
        return tuple(TOKENS.convert(part, param, ctx) for part in str(value).split(","))


class _Numbers(click.ParamType):
    name = "n,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:  # noqa: ARG002
        """Whole numbers from 1 to 8, separated by commas; raises `UserError`."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.isdecimal() and 1 <= int(part) <= MOST_TOGETHER for part in parts):
            raise UserError(f"{value!r} is no list of numbers from 1 to {MOST_TOGETHER}, such as 1,4.", ExitCode.USAGE)
        return tuple(map(int, parts))


SIZE, TOKENS, TOKEN_LIST, NUMBERS = _Size(), _Tokens(), _TokenList(), _Numbers()
