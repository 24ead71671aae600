"""The price book: what ships, what overrides it, and every way to get it wrong."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.meter import Usage
from cluster.power import Part
from distill_jobs.costs.prices import PriceBook
from distill_jobs.errors import SpecError
from distill_jobs.spec.costs import Costs


def book(**costs: object) -> PriceBook:
    return PriceBook.load(Costs.model_validate(costs))


def test_the_shipped_book_is_whole() -> None:
    shipped = book()
    assert shipped.cpu_hour > 0 and shipped.storage_gb_month > 0 and shipped.as_of and not shipped.changed
    assert {"T4", "A100", "H100", "H200", "other"} <= set(shipped.accelerator_hour)


def test_every_shipped_price_says_where_it_is_from() -> None:
    import yaml

    import distill_jobs.costs as package

    tree = yaml.safe_load((Path(package.__path__[0]) / "prices.yaml").read_text())
    prices = [tree["cpu_hour"], tree["storage_gb_month"], *tree["accelerator_hour"].values()]
    assert all(price["source"] for price in prices)


def test_overrides_lie_over_the_file_and_the_file_over_the_book(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("cpu_hour: 0.03\naccelerator_hour:\n  H100: {usd: 2.5, source: quote}\n  MyChip: 9\n")
    found = book(prices=str(mine), override={"cpu_hour": 0.02, "MyChip_hour": 8.0})
    assert found.cpu_hour == 0.02
    assert found.accelerator_price("H100") == 2.5 and found.accelerator_price("MyChip") == 8.0
    assert found.accelerator_price("T4") == book().accelerator_price("T4")
    assert set(found.changed) == {"cpu_hour", "H100_hour", "MyChip_hour"}


def test_money() -> None:
    prices = book(override={"cpu_hour": 0.1, "H100_hour": 4.0, "other_hour": 3.0, "storage_gb_month": 0.02})
    assert prices.money(Usage(core_seconds=7200), None) == pytest.approx(0.2)
    assert prices.money(Usage(core_seconds=3600, device_seconds=1800), "H100") == pytest.approx(2.1)
    assert prices.money(Usage(device_seconds=3600), "Abacus") == pytest.approx(3.0)
    assert prices.storage(5e9, months=2) == pytest.approx(0.2)
    assert prices.note("H100") is None
    assert "costs.override.other_hour" in str(prices.note("Abacus"))


def test_spot_prices(tmp_path: Path) -> None:
    prices = book(override={"cpu_hour": 0.1, "cpu_spot_hour": 0.03, "H100_hour": 4.0, "H100_spot_hour": 1.0})
    usage = Usage(core_seconds=3600, device_seconds=3600)
    assert prices.money(usage, "H100", lambda _: True) == pytest.approx(1.03)
    assert prices.money(usage, "H100", Costs(spot={"H100": True}).is_spot) == pytest.approx(1.1)
    assert prices.money(usage, "H100", Costs(spot=False).is_spot) == pytest.approx(4.1)
    # Without a spot price, the price on demand; and never more than that.
    assert prices.hour("Abacus", spot=True) == prices.accelerator_price("other")
    assert book(override={"L4_hour": 0.1}).hour("L4", spot=True) == 0.1
    mine = tmp_path / "mine.yaml"
    mine.write_text("cpu_hour: {usd: 1, spot: 0.5}\naccelerator_hour: {H100: 3, L4: {usd: 2, spot: 0.7}}\n")
    found = book(prices=str(mine))
    assert (found.hour("CPU", True), found.hour("H100", True), found.hour("L4", True)) == (0.5, 3.0, 0.7)
    assert found.hour("T4", True) == book().hour("T4", True) < found.hour("T4")


def test_what_is_known_to_be_on_a_node_is_priced_by_what_it_is() -> None:
    prices = book(override={"H100_hour": 3.6, "L4_hour": 0.36, "cpu_hour": 0.0})
    parts = (Part("a", "H100", seconds=1000.0), Part("b", "L4", seconds=1000.0))
    assert prices.money(Usage(device_seconds=3000.0, parts=parts), "L4") == pytest.approx(1.0 + 0.1 + 0.1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=6))
def test_money_adds_up(pieces: list[tuple[float, float]]) -> None:
    prices = book()
    usages = [Usage(core_seconds=c, device_seconds=d) for c, d in pieces]
    whole = prices.money(sum(usages, Usage()), "H100")
    assert whole == pytest.approx(sum(prices.money(u, "H100") for u in usages))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ({"H10_hour": 1.0}, "did you mean H100_hour"),
        ({"cpu_hours": 1.0}, "did you mean cpu_hour"),
        ({"zzz": 1.0}, "known: "),
        ({"cpu_hour": -1.0}, "0 or more"),
        ({"cpu_hour": float("nan")}, "0 or more"),
        ({"H100_hour": float("inf")}, "0 or more"),
    ],
)
def test_a_wrong_override_is_one_sentence(override: dict[str, float], said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        book(override=override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu_hourr: 1", "did you mean cpu_hour"),
        ("accelerators: {H100: 1}", "did you mean accelerator_hour"),
        ("accelerator_hour: {H100: {used: 1}}", "did you mean usd"),
        ("accelerator_hour: {H100: dear}", "found 'dear'"),
        ("cpu_hour: true", "found True"),
        ("accelerator_hour: [1]", "must be a mapping"),
        ("- 1", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("cpu_hour: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(SpecError, match=said) as caught:
        book(prices=str(tmp_path / "p.yaml"))
    assert "\n" not in str(caught.value) and "p.yaml" in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"is missing; check costs\.prices"):
        book(prices=str(tmp_path / "none.yaml"))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SpecError, match="not UTF-8"):
        book(prices=str(tmp_path / "bytes.yaml"))


def test_each_kind_of_accelerator_has_its_own_price() -> None:
    book = PriceBook.load(Costs())
    mixed = Usage(device_seconds=7200 + 3600 + 1800, by_accelerator={"H100": 7200.0, "L4": 3600.0})
    hours = 2 * book.accelerator_price("H100") + book.accelerator_price("L4") + 0.5 * book.accelerator_price("A100")
    assert book.money(mixed, "A100") == pytest.approx(hours)
    both = mixed + Usage(device_seconds=60, by_accelerator={"L4": 60.0})
    assert both.by_accelerator == {"H100": 7200.0, "L4": 3660.0} and Usage.of(both.as_dict()) == both


def test_a_slip_in_the_name_of_a_spot_device_is_told() -> None:
    for slip, meant in (("h100", "H100"), ("cpu", "CPU")):
        with pytest.raises(SpecError, match=rf"^costs.spot: there is no device {slip}; did you mean {meant}\?$"):
            PriceBook.load(Costs(spot={slip: True}))
    assert PriceBook.load(Costs(spot={"CPU": False, "H100": True, "Abacus": True})).cpu_hour > 0
