"""Maps over several nodes: real raylets on this machine, one killed, one drained, one that joins."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import notice
from cluster.errors import ResourceError
from cluster.session import Session, _search_path
from cluster.shards import Crew, Progress, map_shards


class Sleeper:
    """Says where it ran; on the node that ``mark`` names it hangs until that is gone."""

    def __init__(self, mark: Path | None = None) -> None:
        self.mark = mark

    def run(self, _: int) -> tuple[int, str]:
        time.sleep(0.2)
        node = ray.get_runtime_context().get_node_id()
        while self.mark is not None and self.mark.exists() and self.mark.read_text() == node:
            time.sleep(0.1)
        return os.getpid(), node


class Patient:
    """Works on shard 0 until it is told to go; leaves a mark of where it is, and counts the attempts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, shard: int) -> float | None:
        attempt = len(list(self.folder.glob(f"{shard}.*")))
        (self.folder / f"{shard}.{attempt}").write_text(ray.get_runtime_context().get_node_id())
        if shard == 0 and attempt == 0:
            deadline = time.time() + 60
            while not notice.leaving() and time.time() < deadline:
                time.sleep(0.05)
            (self.folder / "left").write_text(str(notice.seconds_left()))
            raise notice.HandBack
        time.sleep(0.1)
        return notice.seconds_left()


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    with _search_path():
        running = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def joined(head: Cluster) -> Iterator[Session]:
    with Session(head.address) as session:
        yield session


@contextmanager
def node(head: Cluster, cpus: int) -> Iterator[Any]:
    added = head.add_node(num_cpus=cpus)
    try:
        yield added
    finally:
        head.remove_node(added)


def collect(session: Session, crew: Crew, count: int, on_value: Any, **more: Any) -> tuple[dict[int, Any], Any]:
    found: list[tuple[int, Any]] = []

    def on_result(shard: int, value: Any) -> None:
        found.append((shard, value))
        on_value(len(found), value)

    report = map_shards(session, crew, range(count), on_result, **more)
    assert Counter(shard for shard, _ in found) == Counter(range(count))
    return dict(found), report


def test_what_no_node_can_hold_is_refused_at_once(joined: Session, head: Cluster) -> None:
    with node(head, 1):
        assert not joined.grows
        with pytest.raises(ResourceError, match="1 worker of 2 CPU, but the cluster's nodes have room for 0"):
            map_shards(joined, Crew(Sleeper, cpus=2), range(3), print)
        with pytest.raises(ResourceError, match=r"2 workers of 1 tile \(2 in all\), but the cluster has 0"):
            map_shards(joined, Crew(Sleeper, least=2, most=2, resources={"tile": 1}), range(3), print)


def test_a_killed_node_costs_its_shards_one_retry(head: Cluster, joined: Session, tmp_path: Path) -> None:
    with node(head, 2) as doomed:
        (raylet,) = doomed.all_processes["raylet"]

        mark, killed = tmp_path / "doomed", []

        def on_value(done: int, value: tuple[int, str]) -> None:
            if value[1] == doomed.node_id and not killed:
                killed.append(done)
                mark.write_text(doomed.node_id)
                os.kill(raylet.process.pid, signal.SIGKILL)

        crew = Crew(lambda: Sleeper(mark), most=3, least=3)
        found, report = collect(joined, crew, 20, on_value, retries=1)
    nodes = {value[1] for value in found.values()}
    assert nodes == {doomed.node_id, head.head_node.node_id} and killed
    # Ray takes its time to declare a node dead. Until then copies of the shards that hang there get the work done.
    assert 1 <= report.retried + report.duplicated <= 4
    assert report.retried <= report.lost_actors <= 2 and report.handed_back == 0


@pytest.mark.slow
def test_the_pool_grows_when_a_node_joins(head: Cluster, joined: Session) -> None:
    added: list[Any] = []
    actors: list[tuple[int, int]] = []

    def on_value(done: int, _: Any) -> None:
        if done == 2:
            added.append(head.add_node(num_cpus=2))

    def on_progress(progress: Progress) -> None:
        actors.append((progress.actors, progress.starting))

    found, report = collect(joined, Crew(Sleeper, most=3), 60, on_value, on_progress=on_progress)
    head.remove_node(added[0])
    assert len({value[0] for value in found.values()}) == 3
    assert {value[1] for value in found.values()} == {head.head_node.node_id, added[0].node_id}
    assert (1, 2) in actors and any(working == 3 for working, _ in actors)
    assert report.lost_actors == report.retried == 0
    assert report.usage.core_seconds < 3 * report.usage.wall_seconds - 1


@pytest.mark.slow
def test_a_drained_node_gives_its_shard_back(head: Cluster, joined: Session, tmp_path: Path) -> None:
    with node(head, 1) as spot:
        holder = _hold_head(head)  # so that the actor must go to the other node
        drained: list[bool] = []

        def on_progress(_: Progress) -> None:
            begun, left = tmp_path / "0.0", tmp_path / "left"
            if not drained and begun.exists():
                assert begun.read_text() == spot.node_id
                gcs = ray._raylet.GcsClient(address=head.address)
                why = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
                drained.append(gcs.drain_node(spot.node_id, why, "", int((time.time() + 50) * 1000))[0])
            if left.exists() and holder:
                ray.kill(holder.pop())

        crew = Crew(lambda: Patient(tmp_path))
        found, report = collect(joined, crew, 3, lambda *_: None, retries=0, on_progress=on_progress)
    assert drained == [True] and set(found) == {0, 1, 2}
    assert 0 < float((tmp_path / "left").read_text()) <= 50
    assert (report.handed_back, report.retried) == (1, 0)
    assert (tmp_path / "0.1").read_text() == head.head_node.node_id


@ray.remote(num_cpus=1)
class _Holder:
    def where(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


def _hold_head(head: Cluster) -> list[Any]:
    """Take the head's CPU, so that the actor must go to the other node."""
    there = NodeAffinitySchedulingStrategy(head.head_node.node_id, soft=False)
    holder = _Holder.options(scheduling_strategy=there).remote()
    assert ray.get(holder.where.remote()) == head.head_node.node_id
    return [holder]
