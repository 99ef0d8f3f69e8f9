import pytest

from shopping_basket import Basket, Catalog, Product, Stock

PRODUCTS = [
    Product("TEA", "Green tea", 450, weight=100, tax_class="reduced", tags=("drink", "organic")),
    Product("MUG", "Blue mug", 990, weight=350),
    Product("POT", "Tea pot", 2990, weight=1200),
    Product("BOOK", "The art of tea", 1500, weight=600, tax_class="reduced", tags=("paper",)),
    Product("CARD", "Gift card", 2500, tax_class="exempt", tags=("paper", "gift")),
]


@pytest.fixture
def catalog():
    return Catalog(PRODUCTS)


@pytest.fixture
def stock():
    return Stock({"TEA": 50, "MUG": 12, "POT": 3, "BOOK": 5, "CARD": 100})


@pytest.fixture
def basket(catalog):
    """Two teas and a mug: 18.90, 550 g."""
    basket = Basket()
    basket.add(catalog["TEA"], 2)
    basket.add(catalog["MUG"])
    return basket
