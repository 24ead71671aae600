"""The ledger: entries replace each other, totals are sums, and a damaged file is told at once."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.files import Folder
from cluster.meter import COUNTED, Usage
from distill_jobs.costs.ledger import LEDGER, Entry, Ledger, metrics, total
from distill_jobs.costs.prices import PriceBook
from distill_jobs.errors import DataError
from distill_jobs.spec.parts import Costs

seconds = st.floats(0, 1e7)
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
)
stages = st.sampled_from(["prepare", "teacher", "capture", "student/0", "baseline/0", "evaluate"])


def test_an_entry_is_replaced_not_added(tmp_path: Path) -> None:
    ledger = Ledger(Folder(str(tmp_path)))
    assert ledger.entries() == [] and ledger.totals().usd == 0 and not ledger.has("capture")
    ledger.record("prepare", Usage(core_seconds=10, wall_seconds=5), 0.5, "H100", 0.0, 5.0)
    ledger.record("capture", Usage(device_seconds=4, tokens=7), 1.0, "H100", 5.0, 9.0, bytes=100)
    ledger.record("prepare", Usage(core_seconds=20, wall_seconds=8), 0.75, None, 10.0, 18.0)
    first, second = Ledger(Folder(str(tmp_path))).entries()
    assert (first.stage, first.usd, first.accelerator) == ("prepare", 0.75, None)
    assert (second.stage, second.bytes, second.accelerator) == ("capture", 100, "H100")
    assert ledger.totals().usd == 1.75
    assert ledger.has("prepare", since=18.0) and not ledger.has("prepare", since=18.5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(stages, usages, st.floats(0, 1e5), counts), max_size=8))
def test_totals_are_the_sum_of_the_parts(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, Usage, float, int]]
) -> None:
    folder = Folder(str(tmp_path_factory.mktemp("ledger")))
    ledger = Ledger(folder)
    for stage, usage, usd, size in records:
        ledger.record(stage, usage, usd, "H100", 0.0, 1.0, bytes=size)
    last = {stage: (usage, usd, size) for stage, usage, usd, size in records}
    entries = ledger.entries()
    assert {e.stage: (e.usage, e.usd, e.bytes) for e in entries} == last
    whole = ledger.totals()
    assert whole == total(entries[::-1])
    assert whole.usd == pytest.approx(sum(usd for _, usd, _ in last.values()))
    assert whole.bytes == sum(size for _, _, size in last.values())
    summed = sum((usage for usage, _, _ in last.values()), Usage())
    assert all(getattr(whole.usage, name) == pytest.approx(getattr(summed, name)) for name in COUNTED)
    assert whole.usage.tokens == summed.tokens
    if entries:
        assert Entry.of(folder.read_json(LEDGER)["totals"]) == whole


def test_overhead_is_what_the_work_leaves_unaccounted(tmp_path: Path) -> None:
    prices = PriceBook.load(Costs(override={"cpu_hour": 3600.0}))
    ledger = Ledger(Folder(str(tmp_path)))
    held = Usage(core_seconds=30, wall_seconds=15, cpu_seconds=20)
    spent = Usage(core_seconds=22, wall_seconds=11, cpu_seconds=21, tokens=5)
    entry = ledger.record_overhead("train/start-up", held, spent, prices, None)
    assert entry.usage == Usage(core_seconds=8, wall_seconds=4)
    assert entry.usd == pytest.approx(8.0)
    assert entry.ended - entry.started == pytest.approx(4.0, abs=1e-3)


def test_metrics_have_one_set_of_names() -> None:
    entry = Entry("capture", Usage(device_seconds=1800, core_seconds=7200, tokens=2_000_000), 4.0, "H100", 0.0, 1.0, 10)
    found = metrics(entry)
    assert found["cost/usd"] == 4.0 and found["cost/gpu_hours"] == 0.5 and found["cost/cpu_hours"] == 2.0
    assert found["cost/usd_per_million_tokens"] == 2.0 and found["cost/bytes_kept"] == 10
    assert "cost/usd_per_million_tokens" not in metrics(total([]))


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": [1]}', '{"entries": [{"stage": "x"}]}', "null"])
def test_a_damaged_ledger_is_told_before_anything_is_spent(tmp_path: Path, text: str) -> None:
    (tmp_path / LEDGER).write_text(text)
    with pytest.raises(DataError, match="is damaged"):
        Ledger(Folder(str(tmp_path)))


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    Ledger(Folder(str(tmp_path))).record("prepare", Usage(rows=3), 0.0, None, 1.0, 2.0)
    tree = json.loads((tmp_path / LEDGER).read_text())
    assert tree["currency"] == "USD" and tree["entries"][0]["usage"]["rows"] == 3


def test_several_kinds_of_accelerators_in_one_entry(tmp_path: Path) -> None:
    ledger = Ledger(Folder(str(tmp_path)))
    usage = Usage(device_seconds=30.0, by_accelerator={"L4": 20.0, "H100": 10.0})
    entry = ledger.record("capture", usage, 1.0, "H100", 0.0, 1.0)
    ledger.record("student/0", Usage(device_seconds=5.0), 1.0, "H100", 0.0, 1.0)
    assert entry.accelerator == "H100, L4"
    whole = Ledger(Folder(str(tmp_path))).totals()
    assert whole.accelerator == "H100, L4" and whole.usage.by_accelerator == {"H100": 10.0, "L4": 20.0}
