from shopping_basket.checkout import Order
from shopping_basket.history import best_sellers, bought_together, group_by_voucher, median_total

ORDERS = [
    Order({"TEA": 5, "MUG": 1}, 1000, 0, 0, 0, voucher="MAY"),
    Order({"MUG": 2}, 2000, 0, 0, 0),
    Order({"TEA": 1, "POT": 3, "MUG": 1}, 6000, 0, 0, 0, voucher="MAY"),
]


def test_best_sellers():
    assert best_sellers(ORDERS, 2) == ["TEA", "MUG"]


def test_best_sellers_break_ties_by_name():
    assert best_sellers([Order({"B": 1, "A": 1, "C": 2}, 0, 0, 0, 0)]) == ["C", "A", "B"]


def test_bought_together():
    assert bought_together(ORDERS, "TEA") == ["MUG", "POT"]
    assert bought_together(ORDERS, "POT", 1) == ["MUG"]


def test_bought_with_nothing():
    assert bought_together(ORDERS, "BOOK") == []


def test_median_of_an_odd_number():
    assert median_total(ORDERS) == 2000


def test_median_of_an_even_number():
    assert median_total(ORDERS[:2]) == 1500


def test_median_of_nothing():
    assert median_total([]) == 0


def test_orders_are_grouped_by_voucher():
    assert group_by_voucher(ORDERS) == {"MAY": [ORDERS[0], ORDERS[2]]}


def test_groups_do_not_remember_earlier_calls():
    group_by_voucher(ORDERS)
    assert group_by_voucher(ORDERS[:1]) == {"MAY": [ORDERS[0]]}


def test_groups_can_be_continued():
    groups = group_by_voucher(ORDERS[:1])
    assert group_by_voucher(ORDERS[1:], groups) == {"MAY": [ORDERS[0], ORDERS[2]]}
