"""Runs read back from MLflow: what was logged of a pipeline and of its nested runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import TrackingError
from cluster.logged import one_line, without_login
from cluster.tracking_server import mlflow_quietly

_PAGE = 1000


@dataclass(frozen=True)
class TrackedRun:
    """One run as MLflow has it.

    Attributes:
        metrics: the last value of each.
        ended: seconds since the epoch; None while it runs.
        nested: the runs under it, in the order in which they began.
    """

    run_id: str
    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    ended: float | None = None
    nested: tuple["TrackedRun", ...] = field(default=())


def read_run(uri: str, run_id: str) -> TrackedRun:
    """A run with its nested runs.

    Raises:
        TrackingError: there is no such run, it was deleted, or the server can't be reached.
    """
    mlflow = mlflow_quietly()
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        run = client.get_run(run_id)
        under = _nested(client, run.info.experiment_id, run_id)
    except Exception as error:
        raise TrackingError(
            f"can't read run {run_id} from MLflow at {without_login(uri)}: {one_line(error)}; "
            "give the id of a pipeline's run, and where it was tracked"
        ) from None
    if run.info.lifecycle_stage != "active":
        raise TrackingError(f"MLflow's run {run_id} was deleted: restore it, or leave it out")
    return _told(run, tuple(_told(each) for each in sorted(under, key=lambda each: each.info.start_time or 0)))


def _nested(client: Any, experiment: str, run_id: str) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment], f"tags.`mlflow.parentRunId` = '{run_id}'", max_results=_PAGE, page_token=token
        )
        found += page
        token = page.token
        if not token:
            return found


def _told(run: Any, nested: tuple[TrackedRun, ...] = ()) -> TrackedRun:
    ended = run.info.end_time / 1000 if run.info.end_time else None
    data = run.data
    return TrackedRun(
        run.info.run_id, run.info.run_name, dict(data.params), dict(data.metrics), dict(data.tags), ended, nested
    )
