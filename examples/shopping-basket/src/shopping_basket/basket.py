"""What a customer has chosen so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator

from shopping_basket.catalog import Product

MAX_QUANTITY = 99


@dataclass(frozen=True)
class Line:
    """One product of a basket and how many of it."""

    product: Product
    quantity: int

    @property
    def total(self) -> int:
        """Price of the line in cents, without tax."""
        return self.product.price * self.quantity

    @property
    def weight(self) -> int:
        """Weight of the line in grams."""
        return self.product.weight * self.quantity


class Basket:
    """Lines by SKU; the same product never has two lines."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}

    def add(self, product: Product, quantity: int = 1) -> None:
        """Add pieces of a product, up to MAX_QUANTITY of each."""
        if quantity < 1:
            raise ValueError("at least one piece is added")
        line = self._lines.get(product.sku)
        total = quantity + (line.quantity if line else 0)
        if total > MAX_QUANTITY:
            raise ValueError(f"no more than {MAX_QUANTITY} pieces of one product")
        self._lines[product.sku] = Line(product, total)

    def remove(self, sku: str, quantity: int | None = None) -> None:
        """Remove some pieces, or all of them when `quantity` is None; an empty line disappears."""
        line = self._lines[sku]
        left = 0 if quantity is None else line.quantity - quantity
        if left > 0:
            self._lines[sku] = Line(line.product, left)
        else:
            del self._lines[sku]

    def merge(self, other: Basket) -> None:
        """Add the lines of another basket, as when a guest signs in; quantities stay within MAX_QUANTITY."""
        for line in other:
            known = self.quantity(line.product.sku)
            self._lines[line.product.sku] = Line(line.product, min(known + line.quantity, MAX_QUANTITY))

    def quantity(self, sku: str) -> int:
        """Return the number of pieces of one product."""
        return self._lines[sku].quantity if sku in self._lines else 0

    def quantities(self) -> dict[str, int]:
        """Return SKU -> pieces, as the stock wants it."""
        return {sku: line.quantity for sku, line in self._lines.items()}

    @property
    def subtotal(self) -> int:
        """Sum of the lines in cents, without tax."""
        return sum(line.total for line in self)

    @property
    def weight(self) -> int:
        """Weight of everything in grams."""
        return sum(line.weight for line in self)

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines.values())

    def __len__(self) -> int:
        return len(self._lines)
