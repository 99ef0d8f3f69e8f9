"""Arithmetic on cents: rounding, shares, and the text that customers read."""

from __future__ import annotations


def percent_of(cents: int, percent: int) -> int:
    """Return `percent` per cent of `cents`, with half a cent rounded up."""
    return (cents * percent + 50) // 100


def split(cents: int, parts: int) -> list[int]:
    """Split an amount into `parts` that add up to it and differ by one cent at most; larger parts come first."""
    if parts < 1:
        raise ValueError("an amount is split into at least one part")
    base, rest = divmod(cents, parts)
    return [base + 1 if index < rest else base for index in range(parts)]


def format_money(cents: int, currency: str = "EUR") -> str:
    """Return text such as `1,234.50 EUR`; a negative amount has its sign in front."""
    sign = "-" if cents < 0 else ""
    whole, fraction = divmod(abs(cents), 100)
    return f"{sign}{whole:,}.{fraction:02d} {currency}"


def parse_money(text: str) -> int:
    """Return the cents in text such as `1,234.5`, `12` or `-0.99`; raise ValueError for anything else."""
    cleaned = text.strip().replace(",", "")
    sign = -1 if cleaned.startswith("-") else 1
    whole, _, fraction = cleaned.lstrip("-").partition(".")
    if not whole.isdigit() or len(fraction) > 2 or (fraction and not fraction.isdigit()):
        raise ValueError(f"not an amount of money: {text!r}")
    return sign * (int(whole) * 100 + int(fraction.ljust(2, "0") or 0))
