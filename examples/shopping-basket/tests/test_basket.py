import pytest

from shopping_basket import Basket
from shopping_basket.basket import MAX_QUANTITY


def test_subtotal_and_weight(basket):
    assert basket.subtotal == 2 * 450 + 990
    assert basket.weight == 2 * 100 + 350


def test_an_empty_basket_costs_nothing():
    assert (Basket().subtotal, Basket().weight, len(Basket())) == (0, 0, 0)


def test_adding_again_adds_up(basket, catalog):
    basket.add(catalog["TEA"], 3)
    assert basket.quantity("TEA") == 5
    assert len(basket) == 2


def test_at_least_one_piece_is_added(basket, catalog):
    with pytest.raises(ValueError, match="at least one"):
        basket.add(catalog["TEA"], 0)


def test_the_highest_quantity_is_allowed(catalog):
    basket = Basket()
    basket.add(catalog["TEA"], MAX_QUANTITY)
    assert basket.quantity("TEA") == MAX_QUANTITY
    with pytest.raises(ValueError, match="no more than"):
        basket.add(catalog["TEA"])


def test_remove_some(basket):
    basket.remove("TEA", 1)
    assert basket.quantity("TEA") == 1


def test_remove_all(basket):
    basket.remove("TEA")
    assert basket.quantities() == {"MUG": 1}


def test_a_line_without_pieces_disappears(basket):
    basket.remove("TEA", 2)
    assert basket.quantities() == {"MUG": 1}


def test_removing_what_is_not_there(basket):
    with pytest.raises(KeyError):
        basket.remove("POT")


def test_merge(basket, catalog):
    guest = Basket()
    guest.add(catalog["TEA"], 98)
    guest.add(catalog["POT"])
    basket.merge(guest)
    assert basket.quantities() == {"TEA": MAX_QUANTITY, "MUG": 1, "POT": 1}
    assert guest.quantities() == {"TEA": 98, "POT": 1}
