"""The budget: stopped before it is exceeded, and refused where no error of the prediction could save it."""

import pytest

from cluster.errors import ShardError
from cluster.meter import Usage
from cluster.standins import Nature, StandIns
from cluster.supervise import Supervisor
from cluster.team import Crew
from distill_jobs.costs.budget import RESERVE_SECONDS, Spending, refuse_or_warn
from distill_jobs.errors import BudgetError


def priced(usage: Usage) -> float:
    """A dollar a core-second."""
    return usage.core_seconds


def test_a_pool_is_stopped_before_the_budget_is_exceeded_and_what_is_done_is_kept() -> None:
    """On the real supervising loop: ten actors of one core, shards of two seconds, and 200 dollars."""
    spending, done, told = Spending(priced, 200.0), list[int](), list[float]()
    spending.begin("capture", 0.0)

    def hear(usage: Usage) -> None:
        told.append(priced(usage))
        spending.hear("pool", usage)

    backend = StandIns([Nature(seconds=2.0)])
    crew = Crew(lambda: None, most=10)  # type: ignore[arg-type, return-value]
    work = Supervisor(backend, [crew], range(1000), lambda shard, _: done.append(shard), on_usage=hear)
    with pytest.raises(BudgetError, match=r"of \$200\.00, .* of it on capture, .* raise costs\.budget_usd"):
        work.run()
    assert 0 < len(done) < 1000 and max(told) < 200.0
    # It stops with about what ten actors hold in the reserve, and not much earlier.
    assert max(told) > 200.0 - 10 * (RESERVE_SECONDS + 2)
    assert spending.usage.core_seconds == pytest.approx(max(told), abs=10.0)


def test_failures_count_as_waste_in_what_a_pool_tells() -> None:
    """Whatever ends a map, what it has held is told, and what came to nothing is in it."""
    heard: list[Usage] = []
    backend = StandIns([Nature(seconds=10.0, spread=0.0)], fate=lambda _kind, _shard: "raise")
    crew = Crew(lambda: None, most=1, cpus=2)  # type: ignore[arg-type, return-value]
    work = Supervisor(backend, [crew], [0], lambda *_: None, retries=1, on_usage=heard.append)
    with pytest.raises(ShardError):
        work.run()
    # Two attempts of five seconds on two cores, each to its failure.
    assert heard[-1].wasted_core_seconds == pytest.approx(20.0)
    assert heard[-1].core_seconds > heard[-1].wasted_core_seconds


def test_what_was_spent_before_counts() -> None:
    spending = Spending(priced, 10.0)
    spending.begin("train", 4.0)
    spending.hear("gang", Usage(core_seconds=1.0, wall_seconds=100.0))
    with pytest.raises(BudgetError, match=r"\$9\.95 is spent, \$5\.95 of it on train, and \$0\.050 is left"):
        spending.hear("gang", Usage(core_seconds=5.95, wall_seconds=600.0))
    with pytest.raises(BudgetError, match=r"\$12\.00 is spent, and \$0\.00 is left"):
        spending.begin("evaluate", 12.0)


def test_what_is_held_beside_counts() -> None:
    spending = Spending(priced, 100.0)
    spending.begin("train", 0.0, Usage(core_seconds=3.0))
    # A gang of one core with three cores of a live teacher beside it: four dollars a second.
    spending.hear("gang", Usage(core_seconds=14.0, wall_seconds=14.0))
    with pytest.raises(BudgetError, match=r"\$64\.00 is spent"):
        spending.hear("gang", Usage(core_seconds=16.0, wall_seconds=16.0))


def test_several_pools_of_one_stage_add_up_and_are_kept_now_and_then() -> None:
    time, kept = [0.0], list[Usage]()
    spending = Spending(priced, None, kept.append, lambda: time[0])
    spending.begin("prepare", 0.0)
    spending.hear("fit", Usage(core_seconds=1.0, wall_seconds=1.0))
    time[0] = 31.0
    spending.hear("cut", Usage(core_seconds=2.0, wall_seconds=1.0))
    spending.hear("cut", Usage(core_seconds=3.0, wall_seconds=2.0))
    assert [usage.core_seconds for usage in kept] == [3.0] and spending.usage.core_seconds == 4.0


def test_a_hopeless_budget_is_refused_and_a_doubtful_one_told() -> None:
    assert refuse_or_warn(None, 5.0, 1e9, 2.0) is None
    assert refuse_or_warn(10.0, 1.0, 9.0, 2.0) is None
    assert "may stop before the end" in str(refuse_or_warn(10.0, 1.0, 12.0, 2.0))
    with pytest.raises(BudgetError, match=r"is \$10\.00, but \$1\.00 is spent and about \$30\.00 more"):
        refuse_or_warn(10.0, 1.0, 30.0, 2.0)
