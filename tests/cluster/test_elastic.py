"""A gang on several nodes that loses one, goes on smaller, and grows back when one joins: real raylets, one killed."""

import os
import signal
import time
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from resume_cases import Fate, fate_of, prepared, read, run, weights

from cluster.gang import Gang
from cluster.session import Session, _search_path

pytestmark = pytest.mark.slow
STEPS = 40


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


def phases_of(fate: Fate) -> list[tuple[int, list[int]]]:
    """The numbers of ranks one after the other, and the steps done with each."""
    seen = read(fate.notes / "steps.jsonl")
    return [(world, [entry["step"] for entry in some]) for world, some in groupby(seen, lambda each: each["world"])]


def test_a_gang_follows_the_cluster(head: Cluster, joined: Session, tmp_path: Path) -> None:
    job = prepared(joined, tmp_path, dropout=0.0, steps=STEPS)
    doomed = head.add_node(num_cpus=1)
    (raylet,) = doomed.all_processes["raylet"]
    fate = fate_of(job, tmp_path / "elastic", 2, pause=1.0)
    added: list[Any] = []

    def on_report(_: dict[str, Any]) -> None:
        seen = read(fate.notes / "steps.jsonl")
        if seen[-1]["step"] >= 4 and raylet.process.poll() is None and not added:
            os.kill(raylet.process.pid, signal.SIGKILL)
        if seen[-1]["world"] == 1 and not added:
            added.append(head.add_node(num_cpus=1))

    gang = Gang(2, sizes=(1, 2), max_failures=1, look_seconds=2.0)
    try:
        record, notes = run(joined, fate, gang, on_report)
    finally:
        for node in added:
            head.remove_node(node, allow_graceful=False)
    phases = phases_of(fate)
    assert [world for world, _ in phases] == [2, 1, 2], notes
    assert any("goes on with 1 of 2 ranks" in note for note in notes) and any(
        "with 2 of 2 ranks" in note for note in notes
    )
    for _, steps in phases:
        assert all(after == before + 1 for before, after in pairwise(steps))
    # The kill costs what was done since the last checkpoint; growing costs nothing.
    assert phases[1][1][0] <= phases[0][1][-1] + 1 and phases[2][1][0] == phases[1][1][-1] + 1
    rows: dict[int, list[int]] = {}
    for consumed, some in read(fate.notes / "rows.jsonl"):
        assert rows.setdefault(consumed, some) == some
    assert {8 * step for step in range(STEPS)} <= rows.keys()
    assert record["usage"]["rows"] == 8 * STEPS

    alone = fate_of(job, tmp_path / "alone", 1)
    run(joined, alone, Gang(1))
    found, expected = weights(fate), weights(alone)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4, msg=name)


def test_a_drained_node_costs_no_step(head: Cluster, joined: Session, tmp_path: Path) -> None:
    job = prepared(joined, tmp_path, dropout=0.0, steps=16)
    spot = head.add_node(num_cpus=1)
    fate = fate_of(job, tmp_path / "drained", 2, pause=1.0)
    drained: list[bool] = []

    def on_report(values: dict[str, Any]) -> None:
        if values["step"] >= 3 and not drained:
            gcs = ray._raylet.GcsClient(address=head.address)
            why = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            drained.append(gcs.drain_node(spot.node_id, why, "", int((time.time() + 60) * 1000))[0])

    try:
        # It counts as no failure, of which there may be none.
        _, notes = run(joined, fate, Gang(2, sizes=(1, 2), look_seconds=600.0), on_report)
    finally:
        head.remove_node(spot, allow_graceful=False)
    assert drained == [True]
    phases = phases_of(fate)
    assert [world for world, _ in phases] == [2, 1] and notes == ["the gang goes on with 1 of 2 ranks"]
    # At its last step a run is not asked any more.
    assert phases[0][1] + phases[1][1] == list(range(1, 16))
