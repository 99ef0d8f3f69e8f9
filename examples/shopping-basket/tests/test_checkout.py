from datetime import date

import pytest

from shopping_basket import Basket, OutOfStock, checkout
from shopping_basket.checkout import Order, receipt, tax_of
from shopping_basket.vouchers import Voucher

TODAY = date(2024, 5, 17)


def test_tax_by_class(basket, catalog):
    basket.add(catalog["CARD"])
    assert tax_of(basket, 0) == 63 + 198


def test_tax_is_on_the_discounted_price(basket):
    assert tax_of(basket, 189) == 57 + 178


def test_no_tax_on_nothing():
    assert tax_of(Basket(), 0) == 0


def test_an_order_adds_up(basket, stock):
    order = checkout(basket, stock, [], TODAY)
    assert (order.subtotal, order.discount, order.tax, order.shipping) == (1890, 0, 261, 490)
    assert order.total == 1890 + 261 + 490


def test_the_voucher_is_used(basket, stock):
    order = checkout(basket, stock, [Voucher("MAY", percent=10)], TODAY)
    assert (order.voucher, order.discount) == ("MAY", 189)
    assert order.total == 1890 - 189 + 235 + 490


def test_the_bulk_discount_wins_when_it_saves_more(basket, catalog, stock):
    basket.add(catalog["TEA"], 18)
    order = checkout(basket, stock, [Voucher("MAY", amount=100)], TODAY)
    assert (order.voucher, order.discount) == ("", 450)


def test_shipping_is_free_only_after_the_discount(catalog, stock):
    basket = Basket()
    basket.add(catalog["POT"], 2)
    assert checkout(basket, stock, [Voucher("MAY", amount=1000)], TODAY).shipping == 790


def test_checkout_reserves(basket, stock):
    checkout(basket, stock, [], TODAY)
    assert (stock.available("TEA"), stock.available("MUG")) == (48, 11)


def test_nothing_is_reserved_when_something_is_short(basket, catalog, stock):
    basket.add(catalog["POT"], 4)
    with pytest.raises(OutOfStock):
        checkout(basket, stock, [], TODAY)
    assert stock.available("TEA") == 50


def test_an_empty_basket_is_refused(stock):
    with pytest.raises(ValueError, match="empty"):
        checkout(Basket(), stock, [], TODAY)


def test_receipt(basket, stock):
    order = checkout(basket, stock, [Voucher("MAY", percent=10)], TODAY)
    assert receipt(basket, order, width=30).splitlines() == [
        "2 x Green tea         9.00 EUR",
        "1 x Blue mug          9.90 EUR",
        "Subtotal             18.90 EUR",
        "Discount MAY         -1.89 EUR",
        "Tax                   2.35 EUR",
        "Shipping              4.90 EUR",
        "Total                24.26 EUR",
    ]


def test_receipt_leaves_out_what_is_zero(catalog):
    basket = Basket()
    basket.add(catalog["CARD"])
    order = Order(basket.quantities(), 2500, 0, 0, 0)
    assert [row.split()[0] for row in receipt(basket, order).splitlines()] == ["1", "Subtotal", "Total"]


def test_receipt_cuts_long_names(catalog):
    basket = Basket()
    basket.add(catalog["BOOK"])
    row = receipt(basket, Order({}, 1500, 0, 0, 0), width=24).splitlines()[0]
    assert row == "1 x The art... 15.00 EUR"
