"""What a parcel costs, and when it arrives."""

from __future__ import annotations

from datetime import date, timedelta

FREE_FROM = 5000
"""Orders of this many cents or more are delivered free of charge, up to FREE_WEIGHT grams."""
FREE_WEIGHT = 20_000

RATES = ((500, 290), (2_000, 490), (10_000, 790), (30_000, 1490))
"""Grams up to which (inclusive) a parcel costs so many cents."""

ZONES = {"domestic": 1, "europe": 2, "world": 4}
WEEKEND = (5, 6)


def shipping_cost(weight: int, subtotal: int, zone: str = "domestic") -> int:
    """Return the cents for a parcel of `weight` grams; zones abroad multiply the rate and are never free."""
    if zone not in ZONES:
        raise ValueError(f"unknown zone {zone!r}: choose one of {', '.join(ZONES)}")
    if weight == 0:
        return 0
    if zone == "domestic" and subtotal >= FREE_FROM and weight <= FREE_WEIGHT:
        return 0
    for limit, rate in RATES:
        if weight <= limit:
            return rate * ZONES[zone]
    raise ValueError(f"{weight} g is too heavy for one parcel")


def delivery_date(ordered: date, working_days: int, holidays: frozenset[date] = frozenset()) -> date:
    """Return the day on which the parcel arrives: weekends and holidays do not count as working days."""
    day = ordered
    while working_days > 0:
        day += timedelta(days=1)
        if day.weekday() not in WEEKEND and day not in holidays:
            working_days -= 1
    return day
