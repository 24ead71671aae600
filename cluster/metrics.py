"""Prometheus metrics through Ray's own endpoint: what ``cluster.standing`` knows, under names that are declared here.

Every node of a Ray cluster serves the metrics of its processes; ``distill_usd`` is ``ray_distill_usd`` there. They are
told by the driver alone, every few seconds, so that work pays nothing for them. Trouble with them is never the work's:
without an endpoint, over Ray's client (``ray://``), or with ``DISTILL_METRICS=0`` there are none.
"""

import os
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from cluster.standing import STANDING, Key

PREFIX, EXPORTED = "distill_", "ray_distill_"
_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


@dataclass(frozen=True)
class Metric:
    """One metric. All have the tags ``pipeline`` (``job`` is Prometheus' own) and ``stage``; none is of a single shard.

    Attributes:
        about: its help line.
        tags: the tags beside those two.
    """

    kind: Literal["gauge", "counter", "histogram"]
    about: str
    tags: tuple[str, ...] = ()


METRICS = {
    "running": Metric("gauge", "1 while the stage is worked on, 0 afterwards"),
    "waiting": Metric("gauge", "1 while the work waits for the cluster to grow"),
    "done": Metric("gauge", "How much of the stage is done, in its own unit (rows, steps, parts, trials)"),
    "total": Metric("gauge", "How much there is to do in the stage"),
    "shards_done": Metric("gauge", "Shards of the running map that are done"),
    "shards_total": Metric("gauge", "Shards of the running map"),
    "shard_seconds": Metric("histogram", "Seconds from giving a shard to an actor to its result"),
    "actors": Metric("gauge", "Actors that can work"),
    "actors_starting": Metric("gauge", "Actors that wait for room or load their model"),
    "rows": Metric("counter", "Rows prepared or captured"),
    "tokens": Metric("counter", "Tokens captured"),
    "tokens_per_second": Metric("gauge", "Tokens a second, captured or trained on", ("arm",)),
    "store_bytes": Metric("gauge", "Bytes of the logit store's committed parts"),
    "training_step": Metric("gauge", "Optimizer steps done", ("arm",)),
    "training_loss": Metric("gauge", "Loss of the last step that was logged", ("arm",)),
    "step_seconds": Metric("gauge", "Mean seconds of an optimizer step, of those last logged", ("arm",)),
    "reader_waiting": Metric("gauge", "Share of the steps' time spent waiting for data", ("arm",)),
    "faults": Metric("counter", "Faults survived", ("kind",)),
    "usd": Metric("gauge", "US dollars spent by now"),
    "budget_usd": Metric("gauge", "US dollars that may be spent (costs.budget_usd)"),
}
"""By the name that ``STANDING`` has for it."""


def exported(name: str) -> tuple[str, ...]:
    """The names that a metric has at Ray's endpoint."""
    whole, kind = f"{EXPORTED}{name}", METRICS[name].kind
    if kind == "histogram":
        return tuple(f"{whole}_{part}" for part in ("bucket", "sum", "count"))
    return (f"{whole}_total",) if kind == "counter" else (whole,)


class Publisher:
    """Hands over what is known of this process; no method raises.

    Args:
        pipeline: the name of what it works on.
    """

    def __init__(self, pipeline: str) -> None:
        self._pipeline = pipeline
        self._lock = threading.Lock()
        self._closed = os.environ.get("DISTILL_METRICS", "").lower() in ("0", "off", "false", "no")
        self._session: Any = None
        self._made: dict[str, Any] = {}
        self._said: dict[Key, float] = {}
        self._stages: set[str] = set()

    def publish(self) -> None:
        """Hand over what has come since the last call."""
        with self._lock, suppress(Exception):
            if not self._closed and self._endpoint():
                self._hand_over()

    def close(self) -> None:
        """For the last time; after this nothing touches Ray any more, which may end."""
        self.publish()
        with self._lock:
            self._closed = True

    def _endpoint(self) -> bool:
        """Whether there is somewhere to hand it to; asked anew for every Ray session."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized() or ray.util.client.ray.is_connected():
            return False
        session = ray.get_runtime_context().get_job_id(), ray.get_runtime_context().gcs_address
        if self._session is None or self._session[0] != session:
            port = any(node.get("MetricsExportPort") for node in ray.nodes())
            self._session, self._made = (session, port), {}
        return bool(self._session[1])

    def _hand_over(self) -> None:
        self._stages |= {STANDING.stage} - {""}
        for stage in self._stages:
            running = stage == STANDING.stage
            self._metric("running").set(float(running), tags=self._tags(stage))
            self._metric("waiting").set(float(running and STANDING.waiting is not None), tags=self._tags(stage))
        for (name, stage, more), value in STANDING.latest().items():
            self._metric(name).set(value, tags=self._tags(stage, **dict(more)))
        sums = dict(STANDING.sums())
        sums |= {("faults", STANDING.stage, (("kind", kind),)): times for kind, times in STANDING.faults().items()}
        for key, value in sums.items():
            name, stage, more = key
            # Faults belong to whichever stage is running when they are told.
            known = (name, "", more) if name == "faults" else key
            if (new := value - self._said.get(known, 0.0)) > 0:
                self._metric(name).inc(new, tags=self._tags(stage, **dict(more)))
                self._said[known] = value
        for (name, stage, more), value in STANDING.observations():
            self._metric(name).observe(value, tags=self._tags(stage, **dict(more)))

    def _tags(self, stage: str, **more: str) -> dict[str, str]:
        return {"pipeline": self._pipeline, "stage": stage, **more}

    def _metric(self, name: str) -> Any:
        if name not in self._made:
            from ray.util import metrics

            declared = METRICS[name]
            common = {"description": declared.about, "tag_keys": ("pipeline", "stage", *declared.tags)}
            if declared.kind == "histogram":
                made = metrics.Histogram(PREFIX + name, boundaries=list(_SECONDS), **common)
            else:
                made = (metrics.Gauge if declared.kind == "gauge" else metrics.Counter)(PREFIX + name, **common)
            # Tags that a value leaves out are there all the same, as Prometheus has them: empty.
            self._made[name] = made.set_default_tags(dict.fromkeys(declared.tags, ""))
        return self._made[name]
