"""The schedule by itself, and the supervising loop over stand-ins in virtual time: every shard once, whatever fails."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.backend import Ended, Ready
from cluster.errors import FileError, ResourceError, ShardError, TransientFileError
from cluster.pool import PoolReport, Progress
from cluster.schedule import Schedule
from cluster.standins import Nature, StandIns
from cluster.supervise import Supervisor
from cluster.team import Crew


class Idle:
    def run(self, shard: Any) -> Any:
        return shard


def supervise(
    backend: StandIns, most: Sequence[int], shards: Any, **more: Any
) -> tuple[Supervisor, PoolReport, list[tuple[Any, Any]]]:
    found: list[tuple[Any, Any]] = []
    crews = [Crew(Idle, most=count, gpus=1, name=f"kind {kind}") for kind, count in enumerate(most)]
    work = Supervisor(backend, crews, shards, lambda shard, value: found.append((shard, value)), **more)
    report = work.run()
    assert Counter(shard for shard, _ in found) == Counter(shards if isinstance(shards, range) else list(shards))
    return work, report, found


def first_time(what: str, shards: set[int]) -> Callable[[int, Any], str | None]:
    """The fate of these shards the first time that they are given out."""
    left = set(shards)

    def fate(_kind: int, shard: Any) -> str | None:
        if shard not in left:
            return None
        left.discard(shard)
        return what

    return fate


# The schedule


def test_a_shard_that_fails_comes_back_after_a_growing_pause() -> None:
    schedule, waits, now = Schedule(1, retries=3), [], 0.0
    for _ in range(3):
        assert schedule.take(1, 0, now) == 0
        assert schedule.fail(1, now, pause=2.0) is None
        assert schedule.take(1, 0, now) is None
        at = schedule.wake_at([0], now)
        assert at is not None
        waits.append(at - now)
        now = at
    assert waits == [pytest.approx(waits[0] * factor) for factor in (1, 2, 4)] and 1.0 <= waits[0] <= 3.0
    assert schedule.take(1, 0, now) == 0
    assert schedule.fail(1, now) == (0, 4)
    assert schedule.retried == 3


def test_what_is_handed_back_costs_no_retry_and_comes_first() -> None:
    schedule = Schedule(5, retries=0)
    for _ in range(50):
        assert schedule.take(1, 0, 0.0) == 0
        schedule.hand_back(1, 0.0)
    assert (schedule.handed_back, schedule.retried, schedule.open, schedule.untouched) == (50, 0, 5, 4)


def paced(kinds: Sequence[tuple[float, int]], total: int) -> Schedule:
    """A schedule of ``total`` more shards in which the kinds have shown their usual seconds a shard."""
    schedule = Schedule(total + sum(count for _, count in kinds), kinds=len(kinds))
    for kind, (seconds, count) in enumerate(kinds):
        for _ in range(count):
            schedule.take(1000 + kind, kind, -seconds)
            schedule.finish(1000 + kind, 0.0)
    return schedule


def test_a_straggler_is_copied_once_and_the_first_result_wins() -> None:
    schedule = paced([(10.0, 5)], 1)
    assert schedule.take(1, 0, 0.0) == 5
    assert schedule.take(2, 0, 14.9) is None
    assert schedule.wake_at([0], 14.9) == pytest.approx(15.0)
    assert schedule.take(2, 0, 15.0) == 5
    assert schedule.take(3, 0, 99.0) is None and schedule.wake_at([0], 99.0) is None
    assert schedule.finish(2, 25.0) == 5
    assert schedule.shard_of(1) is None
    assert schedule.finish(1, 26.0) is None
    assert (schedule.done, schedule.duplicated, schedule.open) == (6, 1, 0)


@pytest.mark.parametrize("winner_first", [True, False])
def test_a_copys_failure_costs_nothing(winner_first: bool) -> None:
    schedule = paced([(10.0, 5)], 1)
    schedule.take(1, 0, 0.0)
    schedule.take(2, 0, 50.0)
    if winner_first:
        assert schedule.finish(1, 51.0) == 5
        assert schedule.fail(2, 52.0) is None
    else:
        assert schedule.fail(2, 51.0) is None
        assert schedule.take(3, 0, 52.0) == 5  # and the one that is left may be copied again
        schedule.hand_back(1, 53.0)
        assert schedule.finish(3, 54.0) == 5
    assert (schedule.retried, schedule.handed_back, schedule.done) == (0, 0, 6)


def test_a_fast_kind_copies_what_a_slow_one_has_far_to_go_with() -> None:
    schedule = paced([(10.0, 3), (100.0, 3)], 2)
    assert (schedule.take(1, 1, 0.0), schedule.take(2, 1, 80.0)) == (6, 7)
    # At 81 the first has 19 to go and the second 99; a fast actor would take 10.
    assert schedule.take(3, 0, 81.0) == 6
    assert schedule.take(4, 0, 81.0) == 7
    assert schedule.take(5, 1, 82.0) is None
    slow = paced([(10.0, 3), (100.0, 3)], 1)
    assert slow.take(1, 0, 0.0) == 6
    assert slow.take(2, 1, 14.0) is None


def test_nothing_is_copied_while_fresh_work_is_left_or_comes_back() -> None:
    schedule = paced([(10.0, 3)], 3)
    assert schedule.take(1, 0, 0.0) == 3
    assert schedule.take(2, 0, 500.0) == 4
    assert schedule.take(3, 0, 500.0) == 5
    schedule.fail(3, 500.0, pause=10.0)
    assert schedule.take(3, 0, 500.0) is None and schedule.duplicated == 0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 6))
def test_whatever_happens_each_shard_is_done_once(seed: int, total: int, actors: int) -> None:
    random = np.random.default_rng(seed)
    schedule, done, now = Schedule(total, kinds=2, retries=10**6), [], 0.0
    while schedule.open:
        now += float(random.exponential(1.0))
        actor = int(random.integers(actors))
        if actor not in schedule._leases:
            schedule.take(actor, actor % 2, now)
            continue
        what = random.integers(4)
        if what == 0:
            schedule.fail(actor, now, pause=0.1)
        elif what == 1:
            schedule.hand_back(actor, now)
        elif (shard := schedule.finish(actor, now)) is not None:
            done.append(shard)
    assert sorted(done) == list(range(total))
    assert not schedule._runs and not schedule._failures and not any(schedule._single)


# The loop


def test_kinds_work_at_their_own_speed_through_deaths_and_failures() -> None:
    backend = StandIns([Nature(1.0, 0.3, 0.01, 0.02), Nature(5.0, 0.3, 0.01, 0.02)], seed=3)
    work, report, found = supervise(backend, (8, 16), range(3000), retries=8)
    assert len(found) == 3000
    # 8 actors at 1 s against 16 at 5 s: 8 to 3.2.
    assert backend.ran[0] / backend.ran[1] == pytest.approx(2.5, rel=0.15)
    assert report.lost_actors > 10 and report.retried > 40
    assert set(report.by_crew) == {"kind 0", "kind 1"}
    ideal = 3000 / (8 + 3.2)
    assert ideal < report.usage.wall_seconds < 1.2 * ideal + 10
    assert report.by_crew["kind 0"].device_seconds == pytest.approx(8 * report.usage.wall_seconds, rel=0.1)
    assert work.team.members and report.startup_seconds == pytest.approx(5.0)


def test_the_last_stragglers_don_t_hold_up_the_work() -> None:
    backend = StandIns([Nature(1.0, 0.1)], fate=first_time("slow", {90, 95}))
    _, report, _ = supervise(backend, (10,), range(100))
    assert report.duplicated == 2
    assert report.usage.wall_seconds < 25


def test_idle_actors_are_let_go_at_the_end() -> None:
    backend = StandIns([Nature(1.0, 0.0)], fate=lambda _, shard: "slow" if shard == 0 else None)
    _, report, _ = supervise(backend, (50,), range(50))
    assert report.usage.wall_seconds == pytest.approx(105, abs=3)
    # 50 start for 5 s and work for 1; then two are left, one of which copies the slow shard; not 50 for 105 s.
    assert report.usage.device_seconds < 50 * 6 + 2 * 100 + 10


def test_taken_away_or_handed_back_costs_no_retry() -> None:
    for what, lost in (("preempted", 3), ("hand back", 0)):
        backend = StandIns([Nature()], fate=first_time(what, {2, 5, 7}))
        _, report, _ = supervise(backend, (2,), range(10), retries=0)
        assert (report.handed_back, report.retried, report.lost_actors) == (3, 0, lost)
        assert backend.count == 5


def test_a_death_costs_a_retry_and_a_hopeless_shard_is_named() -> None:
    backend = StandIns([Nature()], fate=lambda _, shard: "die" if shard == 4 else None)
    with pytest.raises(ShardError, match=r"^capture: shard 4 failed 3 times, the last time because it died$"):
        supervise(backend, (3,), range(10), retries=2, what="capture")


def test_a_drained_node_loses_its_actors() -> None:
    backend = StandIns([Nature(10.0, 0.0, start_seconds=1.0)])
    backend.drain(5.0, {"node-0": 120.0, "node-3": None})
    _, report, _ = supervise(backend, (3,), range(12), retries=0)
    assert backend.left == [(0, 120.0)]
    assert (report.lost_actors, report.handed_back, report.retried) == (0, 0, 0)
    # Its shard was finished and it went; its replacement was placed on node-3, which is drained too; then came node-4.
    assert backend.count == 5


def test_never_more_actors_than_shards_nor_than_there_is_room_for() -> None:
    backend = StandIns([Nature()])
    supervise(backend, (7,), range(3))
    assert backend.count == 3
    backend = StandIns([Nature(room=2)])
    seen: list[Progress] = []
    supervise(backend, (7,), range(30), on_progress=seen.append)
    assert backend.count == 7 and max(progress.actors for progress in seen) == 2
    assert seen[-1].done == 30


def test_progress_sums_what_actors_tell_dead_ones_included() -> None:
    backend = StandIns([Nature(1.0, 0.0)], fate=first_time("die", {3}))
    for second, tokens in ((6.5, 10.0), (7.5, 30.0)):
        backend.tell(second, 0, tokens=tokens)
        backend.tell(second, 1, tokens=tokens / 10)
    seen: list[Progress] = []
    supervise(backend, (2,), range(20), on_progress=seen.append)
    assert seen[-1].told["tokens"] in (33.0, 31.0, 30.0 + 1.0, 10.0 + 3.0)
    assert 10 <= len(seen) <= backend.time + 2
    assert seen[-1].lost_actors == seen[-1].retried == 1
    assert [p.done for p in seen] == sorted(p.done for p in seen)


def test_errors_of_the_storage_are_tried_again_if_they_may_pass() -> None:
    for error, kind in ((TransientFileError("slow down"), None), (FileError("the disk is full"), FileError)):
        backend = StandIns([Nature(1.0, 0.0)])
        backend.at(5.5, Ended(0, error=error))  # in the midst of its first shard
        if kind is None:
            _, report, _ = supervise(backend, (1,), range(3))
            assert report.retried == 1
        else:
            with pytest.raises(kind, match="the disk is full"):
                supervise(backend, (1,), range(3))


def test_a_start_that_always_fails_ends_the_work() -> None:
    class Failing(StandIns):
        def start(self, kind: int) -> int:
            actor = super().start(kind)
            self.at(4.0, Ready(actor, ShardError("no such model")))
            return actor

    backend = Failing([Nature()])
    with pytest.raises(ShardError, match="no actor of kind 0 can start; the last one failed because no such model"):
        supervise(backend, (4,), range(10), retries=3)
    assert 4 <= backend.count <= 12


def test_nobody_waits_for_ever_for_room() -> None:
    backend = StandIns([Nature(room=0)], short="the cluster has no GPU")
    with pytest.raises(ResourceError, match="nobody can work for 10 minutes: the cluster has no GPU"):
        supervise(backend, (4,), range(10))
    assert 600 < backend.time < 620


def test_shards_may_be_an_array_that_is_never_copied() -> None:
    class Counting(Sequence[int]):
        asked = 0

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, number: Any) -> Any:
            self.asked += 1
            return 3 * number

        def __iter__(self) -> Any:
            raise AssertionError("walked through")

    shards, found = Counting(), []
    crews = [Crew(Idle, most=20)]
    Supervisor(StandIns([Nature()]), crews, shards, lambda shard, _: found.append(shard)).run()
    assert sorted(found) == list(range(0, 3000, 3)) and shards.asked == 2000
    _, _, seen = supervise(StandIns([Nature()]), (2,), np.arange(5, dtype=np.int64))
    assert all(type(shard) is int for shard, _ in seen)
