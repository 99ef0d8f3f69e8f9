import pytest

from shopping_basket import OutOfStock, Stock


def test_unknown_products_are_not_available(stock):
    assert stock.available("NOTHING") == 0


def test_a_delivery_adds_up(stock):
    stock.receive("MUG", 8)
    stock.receive("NEW", 1)
    assert (stock.available("MUG"), stock.available("NEW")) == (20, 1)


def test_a_delivery_has_pieces(stock):
    with pytest.raises(ValueError, match="at least one"):
        stock.receive("MUG", 0)


def test_reserved_pieces_are_not_available(stock):
    stock.reserve({"POT": 2})
    assert stock.available("POT") == 1


def test_the_last_piece_can_be_reserved(stock):
    stock.reserve({"POT": 3})
    assert stock.available("POT") == 0


def test_too_many_are_refused(stock):
    with pytest.raises(OutOfStock) as refused:
        stock.reserve({"POT": 4})
    assert (refused.value.wanted, refused.value.available) == (4, 3)


def test_all_or_nothing_is_reserved(stock):
    with pytest.raises(OutOfStock):
        stock.reserve({"TEA": 1, "POT": 4})
    assert stock.available("TEA") == 50


def test_release_takes_a_promise_back(stock):
    stock.reserve({"POT": 3})
    stock.release({"POT": 2})
    assert stock.available("POT") == 2


def test_no_more_is_released_than_was_reserved(stock):
    stock.reserve({"POT": 1})
    stock.release({"POT": 5})
    assert stock.available("POT") == 3


def test_shipped_pieces_are_gone(stock):
    stock.reserve({"POT": 2})
    stock.ship({"POT": 2})
    assert stock.available("POT") == 1


def test_only_reserved_pieces_are_shipped(stock):
    with pytest.raises(ValueError, match="reserved"):
        stock.ship({"POT": 1})


def test_what_is_short_is_reordered():
    assert Stock({"B": 4, "A": 0, "C": 5}).to_reorder(5) == ["A", "B"]


def test_stocks_are_independent():
    quantities = {"A": 1}
    Stock(quantities).receive("A", 1)
    assert quantities == {"A": 1}
