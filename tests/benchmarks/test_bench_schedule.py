"""What the driver costs: a million shards on a thousand stand-in actors through the real loop, and no-ops on Ray."""

import resource
import time
import tracemalloc

import pytest

from cluster.session import Session
from cluster.shards import Crew, Progress, map_shards
from cluster.standins import Nature, StandIns
from cluster.supervise import Supervisor

pytestmark = pytest.mark.benchmark

ACTORS = (600, 400)


class Nothing:
    def run(self, shard: int) -> int:
        return shard


def simulate(shards: int) -> tuple[Supervisor, StandIns, int, float]:
    crews = [Crew(Nothing, most=most, gpus=1, name=f"kind-{kind}") for kind, most in enumerate(ACTORS)]
    backend = StandIns([Nature(1.0, 0.3, 1e-4, 1e-3), Nature(4.0, 0.3, 1e-4, 1e-3)])
    done = 0

    def on_result(_shard: int, _value: int) -> None:
        nonlocal done
        done += 1

    reports: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        reports[:] = [progress]

    work = Supervisor(backend, crews, range(shards), on_result, retries=5, on_progress=on_progress)
    began = time.perf_counter()
    work.run()
    assert reports[0].done == shards
    return work, backend, done, time.perf_counter() - began


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_a_million_shards_on_a_thousand_actors() -> None:
    simulate(20_000)
    tracemalloc.start()
    simulate(20_000)
    small = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.reset_peak()
    simulate(200_000)
    large = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    before = resident()
    work, backend, done, seconds = simulate(1_000_000)
    after = resident()
    assert done == work.schedule.done == 1_000_000
    schedule = work.schedule
    print(
        f"\n1,000,000 shards on {sum(ACTORS):,} actors of two kinds: {1e6 / seconds:,.0f} shards/s in the driver "
        f"({seconds:.0f} s for {backend.time:,.0f} virtual seconds), {backend.reads:,} turns of the loop\n"
        f"retried {schedule.retried:,}, actors lost {work.lost:,}, copies {schedule.duplicated:,}, "
        f"shards by kind {backend.ran}\n"
        f"resident memory {before:.0f} MiB before, {after:.0f} MiB after; Python's peak {small:.2f} MiB for 20,000 "
        f"shards, {large:.2f} MiB for 200,000"
    )
    assert large < 2 * small + 1


def test_shards_that_do_nothing_on_ray() -> None:
    with Session(cpus=2) as session:
        count, found = 5_000, 0

        def on_result(_shard: int, _value: int) -> None:
            nonlocal found, began
            found += 1
            if found == 500:
                began = time.perf_counter()

        began = 0.0
        report = map_shards(session, Crew(Nothing, most=2), range(count), on_result)
        seconds = time.perf_counter() - began
    assert found == count
    print(
        f"\n{(count - 500) / seconds:,.0f} shards/s that do nothing, on 2 of Ray's actors; first shard given after "
        f"{report.startup_seconds:.1f} s"
    )
