import pytest

from shopping_basket.money import format_money, parse_money, percent_of, split


@pytest.mark.parametrize(
    ("cents", "percent", "expected"), [(1000, 20, 200), (999, 0, 0), (250, 1, 3), (249, 1, 2), (10, 5, 1)]
)
def test_percent_rounds_half_up(cents, percent, expected):
    assert percent_of(cents, percent) == expected


@pytest.mark.parametrize(("cents", "parts", "expected"), [(100, 3, [34, 33, 33]), (5, 5, [1] * 5), (2, 3, [1, 1, 0])])
def test_split(cents, parts, expected):
    assert split(cents, parts) == expected


def test_split_adds_up():
    assert all(sum(split(1001, parts)) == 1001 for parts in range(1, 40))


def test_split_needs_a_part():
    with pytest.raises(ValueError, match="at least one part"):
        split(100, 0)


@pytest.mark.parametrize(
    ("cents", "text"),
    [(0, "0.00 EUR"), (5, "0.05 EUR"), (123450, "1,234.50 EUR"), (-99, "-0.99 EUR"), (-100, "-1.00 EUR")],
)
def test_format(cents, text):
    assert format_money(cents) == text


def test_format_with_another_currency():
    assert format_money(100, "USD") == "1.00 USD"


@pytest.mark.parametrize(
    ("text", "cents"), [("12", 1200), ("1,234.5", 123450), (" 0.05 ", 5), ("-0.99", -99), ("7.", 700)]
)
def test_parse(text, cents):
    assert parse_money(text) == cents


@pytest.mark.parametrize("text", ["", "abc", "1.234", "1.2.3", "--1.x"])
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="not an amount"):
        parse_money(text)
