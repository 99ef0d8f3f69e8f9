"""From a basket to an order: discount, tax, shipping, reservation, receipt."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from shopping_basket.basket import Basket
from shopping_basket.money import format_money, percent_of
from shopping_basket.shipping import shipping_cost
from shopping_basket.stock import Stock
from shopping_basket.vouchers import Voucher, best_voucher, bulk_discount

TAX_PERCENT = {"standard": 20, "reduced": 7, "exempt": 0}


@dataclass(frozen=True)
class Order:
    """What the customer pays, in cents: total = subtotal - discount + tax + shipping."""

    quantities: dict[str, int]
    subtotal: int
    discount: int
    tax: int
    shipping: int
    voucher: str = ""

    @property
    def total(self) -> int:
        """The amount to pay."""
        return self.subtotal - self.discount + self.tax + self.shipping


def tax_of(basket: Basket, discount: int) -> int:
    """Return the tax on the goods, with the discount spread over the lines in proportion to their price."""
    subtotal = basket.subtotal
    if subtotal == 0:
        return 0
    tax = 0
    for line in basket:
        share = discount * line.total // subtotal
        tax += percent_of(line.total - share, TAX_PERCENT[line.product.tax_class])
    return tax


def checkout(
    basket: Basket, stock: Stock, vouchers: list[Voucher], today: date, zone: str = "domestic"
) -> Order:
    """Reserve the goods and return the order.

    The best voucher or the bulk discount is used, whichever saves more. Nothing is reserved when the basket is empty
    (ValueError), too heavy (ValueError) or not in stock (OutOfStock).
    """
    if len(basket) == 0:
        raise ValueError("the basket is empty")
    voucher = best_voucher(vouchers, basket, today)
    saved = voucher.discount(basket) if voucher else 0
    bulk = bulk_discount(basket)
    if bulk > saved:
        voucher, saved = None, bulk
    shipping = shipping_cost(basket.weight, basket.subtotal - saved, zone)
    stock.reserve(basket.quantities())
    return Order(
        quantities=basket.quantities(),
        subtotal=basket.subtotal,
        discount=saved,
        tax=tax_of(basket, saved),
        shipping=shipping,
        voucher=voucher.code if voucher else "",
    )


def receipt(basket: Basket, order: Order, width: int = 40) -> str:
    """Return the receipt as text: one row a product, then the sums; rows that are zero are left out."""
    rows = [(f"{line.quantity} x {line.product.name}", line.total) for line in basket]
    rows.append(("Subtotal", order.subtotal))
    label = f"Discount {order.voucher}".strip()
    extras = [(label, -order.discount), ("Tax", order.tax), ("Shipping", order.shipping)]
    rows += [(name, cents) for name, cents in extras if cents != 0]
    rows.append(("Total", order.total))
    return "\n".join(_row(name, cents, width) for name, cents in rows)


def _row(name: str, cents: int, width: int) -> str:
    amount = format_money(cents)
    space = width - len(amount) - 1
    if len(name) > space:
        name = name[: space - 3] + "..."
    return f"{name.ljust(space)} {amount}"
