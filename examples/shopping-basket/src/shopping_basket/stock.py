"""How many pieces of each product there are, and how many of them are promised to customers."""

from __future__ import annotations

from typing import Mapping


class OutOfStock(Exception):
    """Fewer pieces are available than were asked for."""

    def __init__(self, sku: str, wanted: int, available: int) -> None:
        super().__init__(f"{sku}: {wanted} wanted, {available} available")
        self.sku = sku
        self.wanted = wanted
        self.available = available


class Stock:
    """Pieces on the shelf (`on_hand`) and pieces reserved for open orders."""

    def __init__(self, on_hand: Mapping[str, int] | None = None) -> None:
        self._on_hand = dict(on_hand or {})
        self._reserved: dict[str, int] = {}

    def available(self, sku: str) -> int:
        """Return how many pieces can still be promised."""
        return self._on_hand.get(sku, 0) - self._reserved.get(sku, 0)

    def receive(self, sku: str, count: int) -> None:
        """Put a delivery on the shelf."""
        if count <= 0:
            raise ValueError("a delivery has at least one piece")
        self._on_hand[sku] = self._on_hand.get(sku, 0) + count

    def reserve(self, wanted: Mapping[str, int]) -> None:
        """Promise all of `wanted` (SKU -> pieces), or nothing: raise OutOfStock at the first that is short."""
        for sku, count in wanted.items():
            if count > self.available(sku):
                raise OutOfStock(sku, count, self.available(sku))
        for sku, count in wanted.items():
            self._reserved[sku] = self._reserved.get(sku, 0) + count

    def release(self, wanted: Mapping[str, int]) -> None:
        """Take a promise back; more than was promised cannot be released."""
        for sku, count in wanted.items():
            self._reserved[sku] = max(self._reserved.get(sku, 0) - count, 0)

    def ship(self, wanted: Mapping[str, int]) -> None:
        """Hand reserved pieces over to the carrier: they leave the shelf and the reservations."""
        for sku, count in wanted.items():
            if count > self._reserved.get(sku, 0):
                raise ValueError(f"{sku}: only reserved pieces can be shipped")
            self._reserved[sku] -= count
            self._on_hand[sku] -= count

    def to_reorder(self, minimum: int) -> list[str]:
        """Return the SKUs of which fewer than `minimum` pieces are available, in alphabetical order."""
        return sorted(sku for sku in self._on_hand if self.available(sku) < minimum)
