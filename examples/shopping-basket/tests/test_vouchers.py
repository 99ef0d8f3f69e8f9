from datetime import date

import pytest

from shopping_basket.vouchers import Voucher, best_voucher, bulk_discount

TODAY = date(2024, 5, 17)


def test_percent_and_amount_add_up(basket):
    assert Voucher("A", percent=10, amount=100).discount(basket) == 189 + 100


def test_no_more_than_the_basket_comes_off(basket):
    assert Voucher("A", amount=10_000).discount(basket) == basket.subtotal


def test_a_tag_limits_the_discount(basket):
    assert Voucher("A", percent=50, tag="organic").discount(basket) == 450


def test_the_minimum_is_enough(basket):
    assert Voucher("A", amount=1, minimum=1890).is_valid(basket, TODAY)
    assert not Voucher("A", amount=1, minimum=1891).is_valid(basket, TODAY)


def test_the_minimum_counts_tagged_products_only(basket):
    assert not Voucher("A", amount=1, minimum=901, tag="organic").is_valid(basket, TODAY)


@pytest.mark.parametrize(("day", "valid"), [(16, False), (17, True), (18, True)])
def test_the_last_day_counts(basket, day, valid):
    assert Voucher("A", amount=1, expires=date(2024, 5, day)).is_valid(basket, TODAY) is valid


def test_the_best_voucher_is_chosen(basket):
    small, large = Voucher("SMALL", amount=100), Voucher("LARGE", percent=10)
    expired = Voucher("OLD", percent=90, expires=date(2024, 1, 1))
    assert best_voucher([small, large, expired], basket, TODAY) is large


def test_no_voucher_is_chosen_that_saves_nothing(basket):
    assert best_voucher([Voucher("NONE", percent=10, tag="gift")], basket, TODAY) is None
    assert best_voucher([], basket, TODAY) is None


def test_bulk_discount_starts_at_the_threshold(basket, catalog):
    assert bulk_discount(basket) == 0
    basket.add(catalog["TEA"], 7)
    assert bulk_discount(basket) == 0
    basket.add(catalog["TEA"])
    assert bulk_discount(basket) == 225


def test_bulk_discount_counts_every_line(basket, catalog):
    basket.add(catalog["TEA"], 8)
    basket.add(catalog["MUG"], 9)
    assert bulk_discount(basket, percent=10) == 450 + 990
