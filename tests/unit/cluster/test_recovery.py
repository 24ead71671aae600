"""What is decided about a gang that failed or could grow, without a cluster."""

from collections import Counter
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision
from ray.train.v2.api.config import FailureConfig, ScalingConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster import recovery
from cluster.errors import FileError, GangError, NonFiniteError, Regroup, TransientFileError
from cluster.mailbox import Mail
from cluster.recovery import Failures, Sizes
from cluster.standing import STANDING
from cluster.story import Story

AGAIN, END = FailureDecision.RETRY, FailureDecision.RAISE


class Line:
    """Stands for the way to driver and ranks."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.asked = 0
        self.faults: Counter[str] = Counter()
        self.is_stopped = False

    def note(self, text: str) -> None:
        self.notes.append(text)

    wait = note

    def survived(self, kind: str, times: int) -> None:
        self.faults.update({kind: times})

    def ask(self) -> None:
        self.asked += 1

    def stopped(self) -> bool:
        return self.is_stopped


class Refused(ValueError):
    """An error of the caller's."""


def failed(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("failed", dict(enumerate(errors)))


def failures(limit: int) -> tuple[Failures, Line]:
    line = Line()
    return Failures(FailureConfig(max_failures=limit), (Refused,), line), line  # type: ignore[arg-type]


DEATH = WorkerHealthCheckFailedError("gone", RayActorError())


def test_a_death_is_overcome_as_often_as_allowed() -> None:
    policy, line = failures(2)
    assert [policy.make_decision(failed(DEATH, GangError("connection closed"))) for _ in range(3)] == [
        AGAIN,
        AGAIN,
        END,
    ]
    assert line.notes == ["a rank died; the gang starts again from what it last saved"] * 2


@pytest.mark.parametrize("error", [Refused("no row"), FileError("no space"), NonFiniteError("nan")])
def test_what_would_come_again_ends_it(error: Exception) -> None:
    assert failures(5)[0].make_decision(failed(GangError("closed"), error)) == END


def test_an_error_said_twice_in_the_same_words_ends_it() -> None:
    policy, line = failures(9)
    assert policy.make_decision(failed(GangError("ZeroDivisionError: oh"))) == AGAIN
    assert policy.make_decision(failed(TransientFileError("slow down"))) == AGAIN
    assert policy.make_decision(failed(GangError("ZeroDivisionError: oh"))) == AGAIN
    assert policy.make_decision(failed(DEATH)) == AGAIN
    assert policy.make_decision(failed(GangError("ZeroDivisionError: oh"))) == AGAIN
    assert policy.make_decision(failed(GangError("ZeroDivisionError: oh"))) == END
    assert line.notes[1].startswith("slow down; the gang")


def test_leaving_on_request_costs_nothing_and_a_stopped_gang_stays_stopped() -> None:
    policy, line = failures(0)
    assert [policy.make_decision(failed(Regroup(), GangError("closed"))) for _ in range(3)] == [AGAIN] * 3
    line.is_stopped = True
    assert policy.make_decision(failed(Regroup())) == END


class Running:
    def __init__(self, *nodes: str) -> None:
        self.start_time = 0.0
        self.workers = [_Worker(node) for node in nodes]


class _Worker:
    def __init__(self, node: str) -> None:
        self.metadata = self
        self.node_id = node


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The cluster as the policy sees it, and the time."""
    seen: dict[str, Any] = {"free": {}, "draining": {}, "now": 1000.0}

    def sleep(seconds: float) -> None:
        seen["now"] += seconds

    monkeypatch.setattr(recovery, "available_resources_per_node", lambda: seen["free"])
    monkeypatch.setattr(recovery.ray_state, "get_draining_nodes", lambda: seen["draining"])
    monkeypatch.setattr(recovery.time, "monotonic", lambda: seen["now"])
    monkeypatch.setattr(recovery.time, "sleep", sleep)
    monkeypatch.setattr(Sizes, "_maybe_send_resource_request", lambda _: None)
    return seen


def sizes(*allowed: int) -> tuple[Sizes, Line]:
    line = Line()
    config = ScalingConfig(
        num_workers=(min(allowed), max(allowed)),
        resources_per_worker={"CPU": 2},
        elastic_resize_monitor_interval_s=30,
    )
    return Sizes(config, allowed, line), line  # type: ignore[arg-type]


def started(policy: Sizes) -> int:
    """Ranks of the next start; 0 when a minute brings none."""
    for _ in range(120):
        decision = policy.make_decision_for_non_running_worker_group()
        if not isinstance(decision, NoopDecision):
            return int(decision.num_workers)
    return 0


def test_a_gang_starts_as_large_as_it_may_be(world: dict[str, Any]) -> None:
    policy, line = sizes(1, 2, 4)
    world["free"] = {"a": {"CPU": 5.0}, "b": {"CPU": 3.0}, "c": {"CPU": 1.0}}
    before = world["now"]
    assert started(policy) == 2  # there is room for three
    assert world["now"] - before >= 5 and line.notes == ["the gang goes on with 2 of 4 ranks"]
    world["free"]["c"] = {"CPU": 3.0}
    before = world["now"]
    assert started(policy) == 4 and world["now"] == before
    assert line.notes[1:] == ["the gang goes on with 4 of 4 ranks"]


def test_what_a_failed_gang_held_counts_for_the_next_once(world: dict[str, Any]) -> None:
    policy, _ = sizes(2)
    world["free"] = {"a": {"CPU": 4.0}}
    assert started(policy) == 2
    policy.make_decision_for_running_worker_group(Running("a", "a"), None)
    world["free"] = {"a": {"CPU": 0.0}}
    assert started(policy) == 2
    assert started(policy) == 0


@pytest.mark.usefixtures("world")
def test_it_is_said_when_there_is_no_room() -> None:
    policy, line = sizes(2)
    assert started(policy) == 0
    assert line.notes == ["the gang waits until there is room for 2 ranks"]


def test_room_to_grow_is_noticed_now_and_then(world: dict[str, Any]) -> None:
    policy, line = sizes(1, 2)
    world["free"] = {"a": {"CPU": 2.0}}
    assert started(policy) == 1
    running = Running("a")
    running.start_time = world["now"]
    world["free"] = {"a": {"CPU": 0.0}, "b": {"CPU": 2.0}}
    for seconds, asked in ((29, 0), (1, 1), (29, 1), (1, 2)):
        world["now"] += seconds
        assert isinstance(policy.make_decision_for_running_worker_group(running, None), NoopDecision)
        assert line.asked == asked
    # Of an odd number nothing is to be had.
    world["free"] = {"a": {"CPU": 0.0}, "b": {"CPU": 1.0}}
    world["now"] += 60
    policy.make_decision_for_running_worker_group(running, None)
    assert line.asked == 2 and policy._held == Counter({"a": 1})


def test_a_drained_node_is_left(world: dict[str, Any]) -> None:
    policy, line = sizes(1, 2)
    world["free"] = {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}
    assert started(policy) == 2
    world["draining"] = {"c": 0}
    policy.make_decision_for_running_worker_group(Running("a", "b"), None)
    assert line.asked == 0
    world["draining"], world["now"] = {"b": 0}, world["now"] + 3
    policy.make_decision_for_running_worker_group(Running("a", "b"), None)
    assert line.asked == 1
    world["free"] = {"a": {"CPU": 0.0}, "b": {"CPU": 0.0}}
    assert started(policy) == 1


def test_restarts_and_resizes_are_counted() -> None:
    story, before = Story(0.0, 1, 0), Counter(STANDING.faults())
    for now, mail in enumerate([Mail(sizes=[2]), Mail(sizes=[2]), Mail(left=True), Mail(sizes=[1])], 1):
        story.take(mail, now)
    assert Counter(STANDING.faults()) - before == {"gang_restarts": 1, "gang_resizes": 1}
