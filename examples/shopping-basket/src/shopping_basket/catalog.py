"""What the shop sells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Iterator

TAX_CLASSES = ("standard", "reduced", "exempt")


@dataclass(frozen=True)
class Product:
    """One article. `price` is in cents without tax, `weight` in grams."""

    sku: str
    name: str
    price: int
    weight: int = 0
    tax_class: str = "standard"
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.price < 0:
            raise ValueError(f"{self.sku}: a price cannot be negative")
        if self.tax_class not in TAX_CLASSES:
            raise ValueError(f"{self.sku}: unknown tax class {self.tax_class!r}")


class Catalog:
    """Products by SKU, in the order they were added."""

    def __init__(self, products: Iterable[Product] = ()) -> None:
        self._products: dict[str, Product] = {}
        for product in products:
            self.add(product)

    def add(self, product: Product) -> None:
        """Add a product; a SKU can be taken only once."""
        if product.sku in self._products:
            raise ValueError(f"{product.sku} is in the catalog already")
        self._products[product.sku] = product

    def __getitem__(self, sku: str) -> Product:
        return self._products[sku]

    def __iter__(self) -> Iterator[Product]:
        return iter(self._products.values())

    def __len__(self) -> int:
        return len(self._products)

    def search(self, text: str, max_price: int | None = None) -> list[Product]:
        """Return the products whose name or tag contains `text` in any case, cheapest first.

        `max_price` (inclusive) leaves out dearer ones.
        """
        needle = text.lower()
        found = [
            product
            for product in self
            if needle in product.name.lower() or any(needle in tag.lower() for tag in product.tags)
        ]
        if max_price is not None:
            found = [product for product in found if product.price <= max_price]
        return sorted(found, key=lambda product: product.price)

    def page(self, number: int, size: int = 10) -> list[Product]:
        """Return one page of the catalog; the first page is number 1."""
        if number < 1 or size < 1:
            raise ValueError("pages and their sizes start at 1")
        start = (number - 1) * size
        return list(self)[start : start + size]
