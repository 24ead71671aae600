"""What becomes of a gang that has failed, or for which there is room to grow: Ray Train's two policies, in our words.

They run in Ray Train's controller. Ray's own failure policy starts a gang again whatever has failed, a wrong setting
too; its own elastic one ends a healthy gang without a word when there is room for a larger one, and knows nothing of
what others hold. Here the gang is asked, saves what it has, and leaves.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision
from ray.train.v2.api.config import FailureConfig, ScalingConfig

from cluster.errors import ClusterError, GangError, Regroup, TransientFileError, one_line
from cluster.mailbox import Slot

_SETTLE_SECONDS = 5.0
_PAUSE_SECONDS = 0.5
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
        said = {str(failure) if isinstance(failure, GangError) else one_line(failure) for failure in failures}
        if not died and said and said == self._said:
            return FailureDecision.RAISE
        self._said = set() if died else said
        if decision == FailureDecision.RETRY and failures:
            why = "a rank died" if died else min(said)
            self._slot.note(f"{why}; the gang starts again from what it last saved")
        return decision

    def _lasts(self, failure: Exception) -> bool:
        if isinstance(failure, GangError | TransientFileError):
            return False
        return isinstance(failure, (ClusterError, *self._fatal))


class Elastic(ElasticScalingPolicy):  # type: ignore[misc]
    """Starts a gang as large as there is room for, and asks it to leave when there is room for a larger one.

    Args:
        config: with the least and the most ranks.
        sizes: the numbers of ranks that a gang may have.
        slot: where the gang is asked.
    """

    def __init__(self, config: ScalingConfig, sizes: Sequence[int], slot: Slot) -> None:
        super().__init__(config)
        self._sizes, self._slot = sorted(sizes), slot
        # By node, the ranks of the gang that runs or has just failed: what they hold will be free for the next one.
        self._held: Counter[str] = Counter()
        self._size = 0
        self._asked_at = self._since = float("-inf")

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Ray's question before a start, again and again until there is room."""
        self._maybe_send_resource_request()
        now = time.monotonic()
        if self._since == float("-inf"):
            self._since = now
        size = self._fitting()
        # A node that was just lost may still be counted, and one that is coming not yet.
        if size == 0 or (size < self._sizes[-1] and now - self._since < _SETTLE_SECONDS):
            time.sleep(_PAUSE_SECONDS)
            return NoopDecision()
        if size != (self._size or self._sizes[-1]):
            self._slot.note(f"the gang goes on with {size} of {self._sizes[-1]} ranks")
        self._size, self._since = size, float("-inf")
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
        if now - max(self._asked_at, worker_group_state.start_time) >= every:
            self._asked_at = now
            if self._fitting() > self._size:
                self._slot.ask()
        return NoopDecision()

    def _fitting(self) -> int:
        """The largest of the sizes for which there is room; 0 where there is none."""
        needs = {name: amount for name, amount in self.scaling_config._resources_per_worker_not_none.items() if amount}
        room = 0
        for node, free in available_resources_per_node().items():
            more = min((free.get(name, 0.0) + 1e-6) // amount for name, amount in needs.items())
            room += int(more) + self._held[node]
        return max((size for size in self._sizes if size <= room), default=0)
