"""The basket of a small web shop: prices, stock, vouchers, tax, shipping and receipts.

Money is a whole number of cents everywhere, so that sums are exact.
"""

from shopping_basket.basket import Basket
from shopping_basket.catalog import Catalog, Product
from shopping_basket.checkout import Order, checkout
from shopping_basket.stock import OutOfStock, Stock

__all__ = ["Basket", "Catalog", "Order", "OutOfStock", "Product", "Stock", "checkout"]
