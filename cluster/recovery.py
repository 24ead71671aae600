"""What becomes of a gang that has failed, or for which there is room to grow: Ray Train's two policies, in our words.

They run in Ray Train's controller. Ray's own failure policy starts a gang again whatever has failed, a wrong setting
too; its own elastic one ends a healthy gang without a word when there is room for a larger one, and knows nothing of
what others hold. Here the gang is asked, saves what it has, and leaves; also when a node of its is being drained.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray._private.state import available_resources_per_node
from ray._private.state import state as ray_state  # Ray has no public word of draining nodes; its Train reads this too
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2.api.config import FailureConfig, ScalingConfig

from cluster.errors import ClusterError, GangError, Regroup, TransientFileError, one_line
from cluster.mailbox import Slot

_SETTLE_SECONDS, _PAUSE_SECONDS, _DRAIN_SECONDS = 5.0, 0.5, 2.0
_SILENT_SECONDS = 15.0
_DEATHS = (RayError, WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)

Fatal = tuple[type[Exception], ...]


class Failures(DefaultFailurePolicy):  # type: ignore[misc]  # Ray is untyped
    """Starts a gang again that has lost a rank, up to ``max_failures`` times; a preempted one as often as that happens.

    Errors that would come again end it: those of ``fatal`` and of this package, and any that a rank has raised twice
    in the same words, one start after the other.
    """

    def __init__(self, config: FailureConfig, fatal: Fatal, slot: Slot) -> None:
        super().__init__(config)
        self._fatal, self._slot = fatal, slot
        self._said: set[str] = set()

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        """Ray's question."""
        failures = list(dict(getattr(training_failed_error, "worker_failures", {})).values())
        if self._slot.stopped():
            return FailureDecision.RAISE
        if any(isinstance(failure, Regroup) for failure in failures):
            return FailureDecision.RETRY
        if any(self._lasts(failure) for failure in failures):
            return FailureDecision.RAISE
        decision = super().make_decision(training_failed_error)
        died = any(isinstance(failure, _DEATHS) for failure in failures)
        said = {str(failure) if isinstance(failure, ClusterError) else one_line(failure) for failure in failures}
        if not died and said and said == self._said:
            return FailureDecision.RAISE
        self._said = set() if died else said
        if decision == FailureDecision.RETRY and failures:
            if any("node has died" in str(failure) for failure in failures):
                self._slot.survived("nodes_lost", 1)
            why = "a rank died" if died else min(said)
            self._slot.note(f"{why}; the gang starts again from what it last saved")
        return decision

    def _lasts(self, failure: Exception) -> bool:
        if isinstance(failure, GangError | TransientFileError):
            return False
        return isinstance(failure, (ClusterError, *self._fatal))


class Sizes(ElasticScalingPolicy):  # type: ignore[misc]
    """Starts a gang as large as there is room for, and asks it to leave when there is room for a larger one, or when a
    node of its is about to go.

    Args:
        config: of the largest gang.
        sizes: the numbers of ranks that a gang may have; one for a gang that is always of that size.
        slot: where the gang is asked.
    """

    def __init__(self, config: ScalingConfig, sizes: Sequence[int], slot: Slot) -> None:
        super().__init__(config)
        self._sizes, self._slot = sorted(sizes), slot
        # By node, the ranks of the gang that runs or has just failed: what they hold will be free for the next one.
        self._held: Counter[str] = Counter()
        self._size = 0
        self._looked_at = self._drains_at = float("-inf")
        self._waits_since: float | None = None
        self._waits_loud = False

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Ray's question before a start, again and again until there is room."""
        self._maybe_send_resource_request()
        now = time.monotonic()
        if self._waits_since is None:
            self._waits_since, self._waits_loud = now, False
        waited = now - self._waits_since
        size = self._fitting()
        # What the last gang held may not be free yet, and a node that is coming not be there.
        if size == 0 or (size < self._sizes[-1] and waited < _SETTLE_SECONDS):
            if waited > _SILENT_SECONDS and not self._waits_loud:
                self._waits_loud = True
                self._slot.wait(f"the gang waits until there is room for {_ranks(self._sizes[0])}")
            time.sleep(_PAUSE_SECONDS)
            return NoopDecision()
        if size != (self._size or self._sizes[-1]):
            self._slot.note(f"the gang goes on with {size} of {_ranks(self._sizes[-1])}")
        self._size, self._waits_since = size, None
        self._held.clear()
        return self._get_resize_decision(size)

    def make_decision_for_running_worker_group(
        self,
        worker_group_state: Any,
        worker_group_status: Any,  # noqa: ARG002  # Ray names it
    ) -> ScalingDecision:
        """Ray's question while all is well."""
        self._maybe_send_resource_request()
        self._held = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        now = time.monotonic()
        every = self.scaling_config.elastic_resize_monitor_interval_s
        if now - self._drains_at >= _DRAIN_SECONDS:
            self._drains_at = now
            if self._held.keys() & _draining():
                self._slot.ask()
        if self._size < self._sizes[-1] and now - max(self._looked_at, worker_group_state.start_time) >= every:
            self._looked_at = now
            if self._fitting() > self._size:
                self._slot.ask()
        return NoopDecision()

    def _fitting(self) -> int:
        """The largest of the sizes for which there is room; 0 where there is none."""
        needs = {name: amount for name, amount in self.scaling_config._resources_per_worker_not_none.items() if amount}
        room, draining = 0, _draining()
        for node, free in available_resources_per_node().items():
            if node in draining:
                continue
            more = min((free.get(name, 0.0) + 1e-6) // amount for name, amount in needs.items())
            room += int(more) + self._held[node]
        return max((size for size in self._sizes if size <= room), default=0)


def _draining() -> set[str]:
    """The nodes that are about to go; none where the head can't be asked just now."""
    try:
        return set(ray_state.get_draining_nodes())
    except (RayError, RuntimeError, OSError):
        return set()


def _ranks(count: int) -> str:
    return f"{count} {'rank' if count == 1 else 'ranks'}"
