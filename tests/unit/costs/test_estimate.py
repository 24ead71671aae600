"""Estimates: hand-checked arithmetic, and what must hold for any probe."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jobs.costs.estimate import Held, Work, predict, ranks_of, stage_of, store_bytes, total
from distill_jobs.costs.rates import Rates, Sizes, StartUp
from distill_jobs.costs.reckon import Reckoner
from distill_jobs.spec import Job, parse_job
from distill_jobs.spec.costs import Costs

PRICES = Reckoner(Costs(override={"cpu_hour": 3.6, "H100_hour": 36.0}, kg_co2e_per_kwh=0.5))
SIZES = Sizes(
    source_rows=10_000,
    prepare_row_seconds=0.001,
    train_rows=8000,
    validation_rows=1000,
    test_rows=1000,
    row_bytes=100,
    teacher_bytes=1000,
    student_bytes=10,
)
RATES = Rates(
    capture_row_seconds=0.001,
    encoding_share=0.5,
    student_row_seconds=0.003,
    baseline_row_seconds=0.002,
    teacher_row_seconds=0.004,
    student_forward_row_seconds=0.0002,
    bytes_per_row=8,
    positions_per_row=2,
    teacher_flops=1000.0,
    student_flops=10.0,
)


def job(**changes: object) -> Job:
    train = {"epochs": 2.0, "batch_size": 80, "workers": 2}
    tree = {
        "name": "x",
        "task": "classification",
        "workdir": "out",
        "seeds": [0, 1],
        "data": {"train": "a.csv", "label": "y", "features": {"tabular": {"numeric": ["a"]}}, "actors": 2},
        "teacher": {"model": {"mlp": {}}, "train": {**train, "early_stopping": {}}},
        "student": {"model": {"mlp": {}}, "train": train},
        "capture": {"gpus_per_actor": 1.0},
    }
    return parse_job({**tree, **changes})


def test_by_hand() -> None:
    stages = {e.stage: e for e in predict(job(), SIZES, RATES, PRICES, "H100", StartUp(pool=1.0, gang=2.0))}
    assert list(stages) == ["prepare", "teacher", "capture", "train", "evaluate"]
    assert stages["prepare"].seconds == pytest.approx(1 + 10_000 * 0.001 / 2)
    assert stages["prepare"].usd == pytest.approx(6 * 2 * 0.001)
    # 200 steps of 80 rows and two looks at 1,000 rows, shared by two ranks; each step costs both the engine's 8 ms.
    engine = 200 * 0.008
    assert stages["teacher"].seconds == pytest.approx(2 + engine + (16_000 * 0.004 + 2 * 1000 * 0.0005) / 2)
    assert "stop early" in stages["teacher"].basis
    assert stages["capture"].seconds == pytest.approx(1 + 8)
    assert stages["capture"].usd == pytest.approx(9 * (0.001 + 0.01))
    assert stages["capture"].bytes == 8000 * 108 == store_bytes(8000, 8, 100)
    assert "4 bytes" in stages["capture"].basis
    assert stages["train"].seconds == pytest.approx(
        2 + 4 * engine + 2 * (16_000 * (0.003 + 0.002) + 2 * 2 * 1000 * 0.0002) / 2
    )
    assert stages["train"].bytes == 40
    assert stages["evaluate"].seconds == pytest.approx(1 + 1000 * 0.0005 + 4 * 1000 * 0.0002)


def test_operations_tokens_and_energy_by_hand() -> None:
    stages = {e.stage: e for e in predict(job(), SIZES, RATES, PRICES, "H100", StartUp(pool=1.0, gang=2.0))}
    # 8,000 rows of two positions, 2N = 1,000 operations each.
    assert stages["capture"].usage.tokens == 16_000 and stages["capture"].usage.flops == 16_000 * 1000.0
    # Two seeds, two arms, 200 steps of 80 rows: three times the forward's operations.
    assert stages["train"].usage.tokens == 4 * 200 * 80 * 2
    assert stages["train"].usage.flops == stages["train"].usage.tokens * 30.0
    assert stages["teacher"].usage.flops == 200 * 80 * 2 * 3000.0
    # Nine seconds of one H100 at the 700 W of its board, and of one busy core at 4 W.
    assert stages["capture"].kwh == pytest.approx(9 * (700 + 4) / 3.6e6)
    assert stages["capture"].kg_co2e == pytest.approx(stages["capture"].kwh * 0.5)
    half = {
        e.stage: e for e in predict(job(), SIZES, replace(RATES, busy_share=0.5), PRICES, "H100", StartUp(1.0, 2.0))
    }
    assert half["capture"].kwh == pytest.approx(9 * (700 + 2) / 3.6e6) and half["capture"].usd == stages["capture"].usd
    plain = stages["capture"].as_dict()
    assert plain["core_hours"] == pytest.approx(9 / 3600) == plain["device_hours"]


def test_a_larger_cluster_is_quicker_and_costs_more() -> None:
    one, four = (predict(job(), SIZES, RATES, PRICES, "H100", times=times) for times in (1, 4))
    quicker = {a.stage: (a.seconds, b.seconds) for a, b in zip(one, four, strict=True)}
    assert all(b <= a for a, b in quicker.values()) and quicker["capture"][1] < quicker["capture"][0]
    assert total(four).usd > total(one).usd and total(four).usage.flops == total(one).usage.flops


def test_a_live_teachers_actors_are_held_beside_the_students() -> None:
    stored, live = (
        predict(job(distill={"soft_labels": how}), SIZES, RATES, PRICES, "H100") for how in ("store", "live")
    )
    one, other = (next(e for e in stages if e.stage == "train") for stages in (stored, live))
    assert one.usage.device_seconds == 0 and other.usage.device_seconds == pytest.approx(other.seconds)
    assert other.usd > one.usd and "capture" not in [e.stage for e in live]


def test_a_gang_has_only_ranks_that_share_its_batch() -> None:
    train = job().student.train
    assert [ranks_of(train, most) for most in (1, 2, 3, 4, 6, 16, 100)] == [1, 2, 2, 4, 5, 16, 80]


def test_a_brought_teacher_is_not_trained() -> None:
    brought = job(teacher={"model": {"factory": {"target": "a:b"}}})
    stages = predict(brought, SIZES, replace(RATES, teacher_row_seconds=0.0), PRICES)
    assert "teacher" not in [e.stage for e in stages]


def test_the_basis_is_a_sentence_for_people() -> None:
    one = stage_of("capture", [Work("rows", 1e6, 0.002), Work("more", 2, 5.0)], Held(4, 2.0), 8.0, PRICES, None)
    assert one.basis == "1,000,000 rows at 500/s, 2 more at 0.2/s on each of 4 × 2 CPU, and 8 s to start"


@settings(deadline=None)
@given(st.integers(1, 64), st.floats(1, 1e9), st.floats(1e-6, 10))
def test_more_actors_are_never_slower_and_never_cheaper(actors: int, amount: float, seconds: float) -> None:
    few, many = (
        stage_of("x", [Work("rows", amount, seconds)], Held(n, 1.0), 5.0, PRICES, None) for n in (actors, actors + 1)
    )
    assert many.seconds <= few.seconds and many.usd >= few.usd * (1 - 1e-9)


@settings(deadline=None)
@given(st.integers(0, 10**9), st.floats(0, 1e4))
def test_the_total_is_the_sum(rows: int, per_row: float) -> None:
    stages = predict(job(), replace(SIZES, train_rows=rows), replace(RATES, bytes_per_row=per_row), PRICES)
    whole = total(stages)
    assert whole.seconds == pytest.approx(sum(e.seconds for e in stages))
    assert whole.usd == pytest.approx(sum(e.usd for e in stages))
    assert whole.bytes == sum(e.bytes for e in stages)
