"""The ledger: entries replace each other, totals are sums, and a damaged file is told at once."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.files import Folder
from cluster.meter import COUNTED, Usage
from cluster.power import Part, merged
from distill_jobs.costs.ledger import LEDGER, SCHEMA, SUMMED, Entry, Ledger, metrics, total
from distill_jobs.costs.reckon import Reckoner
from distill_jobs.errors import DataError
from distill_jobs.spec.costs import Costs, TeacherCost

seconds = st.integers(0, 10**10).map(lambda milliseconds: milliseconds / 1000)
counts = st.integers(0, 10**12)
usages = st.builds(
    Usage,
    device_seconds=seconds,
    core_seconds=seconds,
    cpu_seconds=seconds,
    wall_seconds=seconds,
    rows=counts,
    tokens=counts,
    bytes_read=counts,
    bytes_written=counts,
    flops=seconds,
    wasted_core_seconds=seconds,
    by_accelerator=st.dictionaries(st.sampled_from(["H100", "L4"]), seconds, max_size=2),
    parts=st.lists(
        st.builds(
            Part,
            node=st.sampled_from(["a", "b", ""]),
            device=st.sampled_from(["CPU", "H100", "Abacus"]),
            seconds=seconds,
            busy_seconds=seconds,
            joules=seconds,
            counter=st.sampled_from(["", "nvml"]),
        ),
        max_size=4,
    ).map(lambda parts: merged(tuple(parts))),
)
stages = st.sampled_from(["prepare", "teacher", "capture", "student/0", "baseline/0", "evaluate"])
RECKONER = Reckoner(Costs(override={"cpu_hour": 3600.0, "H100_hour": 7200.0}, kg_co2e_per_kwh=0.1, pue=1.2))


def enter(ledger: Ledger, stage: str, usage: Usage, ended: float = 1.0, size: int = 0) -> Entry:
    return ledger.enter(RECKONER.entry(stage, usage, "H100", ended - 1.0, ended, size=size))


def test_an_entry_is_replaced_not_added(tmp_path: Path) -> None:
    ledger = Ledger(Folder(str(tmp_path)))
    assert ledger.entries() == [] and ledger.totals().usd == 0 and not ledger.has("capture")
    enter(ledger, "prepare", Usage(core_seconds=10, wall_seconds=5), 5.0)
    enter(ledger, "capture", Usage(device_seconds=4, tokens=7), 9.0, 100)
    enter(ledger, "prepare", Usage(core_seconds=20, wall_seconds=8), 18.0)
    first, second = Ledger(Folder(str(tmp_path))).entries()
    assert (first.stage, first.usd, first.accelerator) == ("prepare", 20.0, None)
    assert (second.stage, second.usd, second.bytes, second.accelerator) == ("capture", 8.0, 100, "H100")
    assert ledger.totals().usd == 28.0
    assert ledger.has("prepare", since=18.0) and not ledger.has("prepare", since=18.5)
    ledger.drop("prepare")
    assert ledger.find("prepare") is None and ledger.totals().usd == 8.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(stages, usages, counts), max_size=8))
def test_totals_are_the_sum_of_the_parts(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, Usage, int]]
) -> None:
    folder = Folder(str(tmp_path_factory.mktemp("ledger")))
    ledger = Ledger(folder)
    for stage, usage, size in records:
        enter(ledger, stage, usage, size=size)
    last = {stage: (usage, size) for stage, usage, size in records}
    entries = ledger.entries()
    assert {e.stage: (e.usage, e.bytes) for e in entries} == last
    whole = ledger.totals()
    assert whole == total(entries[::-1])
    for name in SUMMED:
        assert getattr(whole, name) == pytest.approx(sum(getattr(e, name) for e in entries))
    summed = sum((usage for usage, _ in last.values()), Usage())
    assert all(getattr(whole.usage, name) == pytest.approx(getattr(summed, name)) for name in COUNTED)
    assert whole.usage.tokens == summed.tokens
    for entry in [*entries, whole]:
        # Money, energy and carbon are those of the parts, and the parts hold all that was held.
        for name in ("usd", "kwh", "kg_co2e"):
            assert getattr(entry, name) == pytest.approx(sum(getattr(part, name) for part in entry.parts))
        for cpu, held in ((True, entry.usage.core_seconds), (False, entry.usage.device_seconds)):
            hours = sum(part.hours for part in entry.parts if (part.device == "CPU") == cpu)
            assert hours * 3600 == pytest.approx(held, rel=1e-6)
        assert entry.kwh_measured <= entry.kwh * (1 + 1e-9)
    if entries:
        assert Entry.of(folder.read_json(LEDGER)["totals"]) == whole


def test_a_ledger_of_the_first_version_is_read_and_one_of_a_later_is_refused(tmp_path: Path) -> None:
    old = {
        "stage": "capture",
        "usage": {"core_seconds": 5.0},
        "usd": 1.5,
        "accelerator": None,
        "started": 0,
        "ended": 1,
    }
    (tmp_path / LEDGER).write_text(json.dumps({"schema_version": 1, "entries": [old], "totals": old}))
    [entry] = Ledger(Folder(str(tmp_path))).entries()
    assert (entry.usd, entry.kwh, entry.parts, entry.kind) == (1.5, 0.0, (), "measured")
    (tmp_path / LEDGER).write_text(json.dumps({"schema_version": SCHEMA + 1, "entries": []}))
    with pytest.raises(DataError, match="is of a later version of distill-jobs"):
        Ledger(Folder(str(tmp_path)))


def test_what_is_held_beyond_the_work_is_told_by_device() -> None:
    parts = (Part("a", "CPU", seconds=30.0, busy_seconds=20.0),)
    held = Usage(core_seconds=30, wall_seconds=15, cpu_seconds=20, wasted_core_seconds=2, parts=parts)
    mine = (Part("a", "CPU", seconds=22.0, busy_seconds=21.0),)
    spent = Usage(core_seconds=22, wall_seconds=11, cpu_seconds=21, tokens=5, parts=mine)
    left = held.beyond(spent)
    assert left == Usage(core_seconds=8, wall_seconds=4, wasted_core_seconds=2, parts=(Part("a", "CPU", seconds=8.0),))
    assert RECKONER.entry("train/start-up", left, None, 0.0, 1.0).usd == pytest.approx(8.0)


def test_the_budget_is_about_machines_alone(tmp_path: Path) -> None:
    ledger = Ledger(Folder(str(tmp_path)))
    enter(ledger, "capture", Usage(core_seconds=3.0), size=10**12)
    ledger.enter(RECKONER.declared(TeacherCost(usd=1000.0, kwh=10.0, kg_co2e=4.0, share=0.25)))
    ledger.enter(RECKONER.storage(ledger.entries()))
    by_stage = {entry.stage: entry for entry in ledger.entries()}
    declared, storage = by_stage["teacher/declared"], by_stage["storage"]
    assert (declared.kind, declared.usd, declared.kwh, declared.kg_co2e) == ("declared", 250.0, 2.5, 1.0)
    assert storage.kind == "storage" and storage.usd == pytest.approx(1000 * RECKONER.prices.storage_gb_month)
    assert ledger.spent() == 3.0 and ledger.totals().usd == pytest.approx(253.0 + storage.usd)


def test_mfu_by_hand() -> None:
    # One H100 for ten seconds can do 9,894e12 operations in half precision, and 669e12 in single.
    half = RECKONER.entry("capture", Usage(device_seconds=10.0, flops=989.4e12), "H100", 0, 1)
    single = RECKONER.entry("capture", Usage(device_seconds=10.0, flops=66.9e12), "H100", 0, 1, precision="fp32")
    assert half.mfu == pytest.approx(0.1) == single.mfu
    assert metrics(half)["cost/mfu"] == pytest.approx(0.1)
    assert total([half, half]).mfu == pytest.approx(0.1)
    cores = RECKONER.entry("capture", Usage(core_seconds=10.0, flops=1e12), None, 0, 1)
    assert cores.mfu is None and "processor" in str(cores.mfu_why) and "cost/mfu" not in metrics(cores)
    strange = RECKONER.entry("capture", Usage(device_seconds=10.0, flops=1e12), "Abacus", 0, 1)
    assert strange.mfu is None and "isn't known" in str(strange.mfu_why)
    nothing = RECKONER.entry("capture", Usage(device_seconds=10.0), "H100", 0, 1)
    assert nothing.mfu is None and "no formula" in str(nothing.mfu_why)


def test_metrics_have_one_set_of_names() -> None:
    entry = Entry("capture", Usage(device_seconds=1800, core_seconds=7200, tokens=2_000_000), 4.0, "H100", 0.0, 1.0, 10)
    found = metrics(entry)
    assert found["cost/usd"] == 4.0 and found["cost/gpu_hours"] == 0.5 and found["cost/cpu_hours"] == 2.0
    assert found["cost/usd_per_million_tokens"] == 2.0 and found["cost/bytes_kept"] == 10
    assert {"cost/kwh", "cost/kg_co2e", "cost/tokens", "cost/wasted_cpu_hours"} <= set(found)
    assert "cost/usd_per_million_tokens" not in metrics(total([]))


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": [1]}', '{"entries": [{"stage": "x"}]}', "null"])
def test_a_damaged_ledger_is_told_before_anything_is_spent(tmp_path: Path, text: str) -> None:
    (tmp_path / LEDGER).write_text(text)
    with pytest.raises(DataError, match="is damaged"):
        Ledger(Folder(str(tmp_path)))


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    enter(Ledger(Folder(str(tmp_path))), "prepare", Usage(rows=3))
    tree = json.loads((tmp_path / LEDGER).read_text())
    assert tree["currency"] == "USD" and tree["entries"][0]["usage"]["rows"] == 3


def test_several_kinds_of_accelerators_in_one_entry(tmp_path: Path) -> None:
    ledger = Ledger(Folder(str(tmp_path)))
    usage = Usage(device_seconds=30.0, by_accelerator={"L4": 20.0, "H100": 10.0})
    entry = enter(ledger, "capture", usage)
    enter(ledger, "student/0", Usage(device_seconds=5.0))
    assert entry.accelerator == "H100, L4"
    whole = Ledger(Folder(str(tmp_path))).totals()
    assert whole.accelerator == "H100, L4" and whole.usage.by_accelerator == {"H100": 10.0, "L4": 20.0}
