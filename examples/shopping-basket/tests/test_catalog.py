import pytest

from shopping_basket import Catalog, Product


def skus(products):
    return [product.sku for product in products]


def test_products_are_found_by_sku(catalog):
    assert catalog["MUG"].name == "Blue mug"
    assert len(catalog) == 5


def test_a_sku_is_taken_once(catalog):
    with pytest.raises(ValueError, match="already"):
        catalog.add(Product("MUG", "Another mug", 100))


def test_prices_are_not_negative():
    with pytest.raises(ValueError, match="negative"):
        Product("X", "Broken", -1)


def test_tax_classes_are_known():
    with pytest.raises(ValueError, match="tax class"):
        Product("X", "Broken", 1, tax_class="luxury")


def test_search_is_sorted_by_price(catalog):
    assert skus(catalog.search("tea")) == ["TEA", "BOOK", "POT"]


def test_search_ignores_case(catalog):
    assert skus(catalog.search("BLUE")) == ["MUG"]


def test_search_looks_at_tags(catalog):
    assert skus(catalog.search("paper")) == ["BOOK", "CARD"]


def test_search_up_to_a_price_includes_it(catalog):
    assert skus(catalog.search("tea", max_price=1500)) == ["TEA", "BOOK"]


def test_pages(catalog):
    assert skus(catalog.page(1, size=2)) == ["TEA", "MUG"]
    assert skus(catalog.page(3, size=2)) == ["CARD"]
    assert catalog.page(4, size=2) == []


def test_pages_start_at_one(catalog):
    with pytest.raises(ValueError, match="start at 1"):
        catalog.page(0)


def test_an_empty_catalog():
    assert skus(Catalog()) == []
