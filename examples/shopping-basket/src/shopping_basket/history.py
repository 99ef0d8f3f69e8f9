"""What customers bought before: statistics and recommendations."""

from __future__ import annotations

from collections import Counter
from typing import Iterable

from shopping_basket.checkout import Order


def best_sellers(orders: Iterable[Order], count: int = 3) -> list[str]:
    """Return the SKUs sold most by pieces, most first; ties are in alphabetical order."""
    pieces: Counter[str] = Counter()
    for order in orders:
        pieces.update(order.quantities)
    return sorted(pieces, key=lambda sku: (-pieces[sku], sku))[:count]


def bought_together(orders: Iterable[Order], sku: str, count: int = 3) -> list[str]:
    """Return the SKUs found most often in the same order as `sku`, which is not one of them."""
    together: Counter[str] = Counter()
    for order in orders:
        if sku in order.quantities:
            together.update(other for other in order.quantities if other != sku)
    return sorted(together, key=lambda other: (-together[other], other))[:count]


def median_total(orders: Iterable[Order]) -> int:
    """Return the median of the orders' totals in cents, rounded down; 0 without orders."""
    totals = sorted(order.total for order in orders)
    if not totals:
        return 0
    middle = len(totals) // 2
    if len(totals) % 2 == 1:
        return totals[middle]
    return (totals[middle - 1] + totals[middle]) // 2


def group_by_voucher(orders: Iterable[Order], groups: dict[str, list[Order]] | None = None) -> dict[str, list[Order]]:
    """Return voucher code -> orders; orders without a voucher are left out. `groups` is continued when given."""
    if groups is None:
        groups = {}
    for order in orders:
        if order.voucher:
            groups.setdefault(order.voucher, []).append(order)
    return groups
