"""Numbers as a person reads them."""

import pytest

from distill_jobs.console import count, duration, money, size


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        (count(1506), "1,506"),
        (count(441_602), "442 K"),
        (count(8_339_475), "8.34 M"),
        (count(134_515_008), "135 M"),
        (money(0), "$0.00"),
        (money(0.000084), "$0.000084"),
        (money(0.0123), "$0.012"),
        (money(1234.5), "$1,234.50"),
        (duration(0.04), "0.0 s"),
        (duration(8.2), "8 s"),
        (duration(125), "2 min 05 s"),
        (duration(11_400), "3 h 10 min"),
        (size(999), "999 B"),
        (size(12_800_000), "12.8 MB"),
        (size(5e13), "50.00 TB"),
    ],
)
def test_numbers(told: str, wanted: str) -> None:
    assert told == wanted
