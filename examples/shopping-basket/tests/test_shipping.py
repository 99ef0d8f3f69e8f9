from datetime import date

import pytest

from shopping_basket.shipping import delivery_date, shipping_cost


@pytest.mark.parametrize(
    ("weight", "cost"), [(0, 0), (1, 290), (500, 290), (501, 490), (2000, 490), (10_000, 790), (30_000, 1490)]
)
def test_domestic_rates(weight, cost):
    assert shipping_cost(weight, 1000) == cost


def test_free_from_fifty():
    assert shipping_cost(1000, 4999) == 490
    assert shipping_cost(1000, 5000) == 0


def test_heavy_parcels_are_not_free():
    assert shipping_cost(20_001, 100_000) == 1490


@pytest.mark.parametrize(("zone", "cost"), [("europe", 980), ("world", 1960)])
def test_zones_abroad_cost_more_and_are_never_free(zone, cost):
    assert shipping_cost(1000, 100_000, zone) == cost


def test_unknown_zones_are_refused():
    with pytest.raises(ValueError, match="unknown zone"):
        shipping_cost(1, 1, "moon")


def test_too_heavy_for_a_parcel():
    with pytest.raises(ValueError, match="too heavy"):
        shipping_cost(30_001, 1000)


@pytest.mark.parametrize(
    ("ordered", "days", "arrives"),
    [
        (date(2024, 5, 13), 2, date(2024, 5, 15)),
        (date(2024, 5, 17), 1, date(2024, 5, 20)),
        (date(2024, 5, 18), 1, date(2024, 5, 20)),
        (date(2024, 5, 17), 0, date(2024, 5, 17)),
    ],
)
def test_delivery_skips_weekends(ordered, days, arrives):
    assert delivery_date(ordered, days) == arrives


def test_delivery_skips_holidays():
    assert delivery_date(date(2024, 5, 17), 1, frozenset({date(2024, 5, 20)})) == date(2024, 5, 21)
