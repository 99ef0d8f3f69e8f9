"""Vouchers: amounts and percentages off, with their conditions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from shopping_basket.basket import Basket
from shopping_basket.money import percent_of


@dataclass(frozen=True)
class Voucher:
    """Takes `percent` off, then `amount` cents; valid from `minimum` cents on and through `expires`."""

    code: str
    percent: int = 0
    amount: int = 0
    minimum: int = 0
    expires: date | None = None
    tag: str = ""
    """When set, only products with this tag count, for the minimum and for the discount."""

    def base(self, basket: Basket) -> int:
        """Return the cents that the voucher applies to."""
        return sum(line.total for line in basket if not self.tag or self.tag in line.product.tags)

    def is_valid(self, basket: Basket, today: date) -> bool:
        """Whether the voucher can be used for this basket today; its last day counts."""
        if self.expires is not None and today > self.expires:
            return False
        return self.base(basket) >= self.minimum

    def discount(self, basket: Basket) -> int:
        """Return the cents that come off: never more than what the voucher applies to."""
        base = self.base(basket)
        return min(percent_of(base, self.percent) + self.amount, base)


def best_voucher(vouchers: list[Voucher], basket: Basket, today: date) -> Voucher | None:
    """Return the valid voucher that saves most, None when none saves anything; the first wins a tie."""
    valid = [voucher for voucher in vouchers if voucher.is_valid(basket, today) and voucher.discount(basket) > 0]
    return max(valid, key=lambda voucher: voucher.discount(basket), default=None)


def bulk_discount(basket: Basket, threshold: int = 10, percent: int = 5) -> int:
    """Return the cents off for lines of `threshold` or more pieces: `percent` of each such line."""
    discount = 0
    for line in basket:
        if line.quantity >= threshold:
            discount += percent_of(line.total, percent)
    return discount
