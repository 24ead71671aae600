"""The plan is kept from before the run, and set against what the ledger then says."""

from pathlib import Path

import pytest
from test_estimate import PRICES, RATES, SIZES, job

from cluster.files import Folder
from cluster.meter import Usage
from distill_jobs.costs.ledger import Ledger, unfinished
from distill_jobs.costs.plan import keep, plan_of, predicted_against_actual, read
from distill_jobs.inputs import inputs_of
from distill_jobs.planning import _asked


def made(inputs: str = "one") -> dict[str, object]:
    return plan_of(job(), inputs, SIZES, RATES, PRICES, "H100")


def test_a_plan_has_each_stage_and_each_size_of_cluster() -> None:
    plan = made()
    stages, sizes = plan["stages"], plan["sizes"]
    assert isinstance(stages, list) and isinstance(sizes, list)
    assert [stage["stage"] for stage in stages] == ["prepare", "teacher", "capture", "train", "evaluate"]
    assert [size["times"] for size in sizes] == [1, 2, 4, 8]
    assert sizes[0]["stages"] == stages and sizes[0]["total"] == plan["total"]
    for name in ("seconds", "usd", "kwh", "kg_co2e", "core_hours", "device_hours", "flops", "tokens"):
        assert sizes[1]["total"][name] == pytest.approx(sum(stage[name] for stage in sizes[1]["stages"]))
    seconds = [size["total"]["seconds"] for size in sizes]
    assert seconds == sorted(seconds, reverse=True) and plan["storage"]["bytes"] == plan["total"]["bytes"]  # type: ignore[index]


def test_what_was_predicted_before_the_run_stays(tmp_path: Path) -> None:
    workdir = Folder(str(tmp_path))
    assert read(workdir) is None and predicted_against_actual(workdir) is None
    first = keep(workdir, {**made(), "made": 1.0})
    # Nothing was done yet but the probe: a later look replaces it.
    ledger = Ledger(workdir)
    ledger.enter(PRICES.entry("probe", Usage(wall_seconds=1.0), None, 0, 1))
    second = keep(workdir, {**first, "made": 2.0})
    assert second["made"] == 2.0
    ledger.enter(PRICES.entry("prepare", Usage(wall_seconds=1.0), None, 0, 1))
    assert keep(workdir, {**first, "made": 3.0})["made"] == 2.0 == (read(workdir) or {})["made"]
    # Another job is another matter.
    assert keep(workdir, {**made("two"), "made": 4.0})["made"] == 4.0


def test_predicted_against_actual(tmp_path: Path) -> None:
    workdir = Folder(str(tmp_path))
    plan = keep(workdir, made())
    predicted = {stage["stage"]: stage for stage in plan["stages"]}
    ledger = Ledger(workdir)
    twice = Usage(core_seconds=2 * 3600 * predicted["capture"]["core_hours"], wall_seconds=18.0, tokens=16_000)
    ledger.enter(PRICES.entry("capture", twice, "H100", 0, 18))
    for arm, seconds in (("student/0", 5.0), ("baseline/0", 3.0), ("train/start-up", 2.0)):
        ledger.enter(PRICES.entry(arm, Usage(core_seconds=seconds, wall_seconds=seconds), None, 0, seconds))
    ledger.enter(PRICES.entry(unfinished("train"), Usage(core_seconds=1.0, wall_seconds=1.0), None, 0, 1))
    ledger.enter(PRICES.entry("probe", Usage(core_seconds=1.0, wall_seconds=1.0), None, 0, 1))
    found = predicted_against_actual(workdir)
    assert found is not None
    assert found["stages"]["capture"]["ratio"]["core_hours"] == pytest.approx(2.0)
    assert found["stages"]["capture"]["ratio"]["tokens"] == 1.0
    assert found["stages"]["train"]["actual"]["seconds"] == 11.0
    assert found["stages"]["evaluate"]["actual"] is None is found["stages"]["evaluate"]["ratio"]
    assert found["total"]["actual"]["seconds"] == 29.0
    assert found["total"]["predicted"]["seconds"] == pytest.approx(
        predicted["capture"]["seconds"] + predicted["train"]["seconds"]
    )
    assert found["not_predicted"] == {"probe": pytest.approx(0.001)}


def test_a_probe_and_the_plan_on_it_stay_when_only_the_question_changes(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1, "y": 0}\n')
    data = {"train": str(tmp_path / "rows.jsonl"), "label": "y", "features": {"tabular": {"numeric": ["a"]}}}

    def asked(**changes: object) -> str:
        one = job(workdir=str(tmp_path / "run"), data=data, **changes)
        return _asked(one, inputs_of(one))

    known = asked()
    for changes in ({"goal": {"iterate": {"runs": 20}}}, {"tune": {"trials": 3}}, {"audit": {"draws": 200}}):
        assert asked(**changes) == known
    assert asked(audit={"gates": ["drop"]}) != known and asked(seeds=[0]) != known
