"""MLflow: a parent run, a nested run per stage, metrics, artifacts and models.

It fails loudly at the start, when there is still nothing to lose, and softly later: a tracking server that stops
answering costs one warning, never the training. MLflow is imported when a ``Tracker`` is made, since that takes
seconds. Nothing here uses MLflow's global state, so that several runs can be open at once.
"""

import functools
import logging
import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

from cluster.errors import TrackingError
from cluster.files import Folder
from cluster.logged import flatten, key_for, one_line, tags_for, without_login
from cluster.model_log import log_model, tag_versions

__all__ = ["Run", "Status", "Tracker", "flatten", "local_uri", "mlflow_quietly", "open_command"]

Status = Literal["FINISHED", "FAILED", "KILLED"]

_log = logging.getLogger(__name__)
_FLUSH_SECONDS = 2.0
_PENDING_METRICS = 1000  # also MLflow's limit for one batch
_BATCH = 100  # MLflow's limit of params or tags in one batch
_PAUSE_SECONDS = 60.0
P = ParamSpec("P")


class Tracker:
    """One MLflow experiment.

    Args:
        uri: the tracking server; None for a SQLite database ``mlflow.db`` and a folder ``mlartifacts`` in ``home``.
        experiment: its name; made if it isn't there.
        home: a local folder, used only when ``uri`` is None.

    Raises:
        TrackingError: the server can't be reached, or the experiment can't be used.
    """

    def __init__(self, uri: str | None, experiment: str, home: Folder) -> None:
        if uri is None and not home.is_local:
            raise TrackingError(
                f"{home} is not on this machine, so MLflow's database can't lie there: give tracking.uri"
            )
        self.uri = uri or local_uri(home)
        self._silent_until = 0.0
        self._warned = False
        mlflow = mlflow_quietly()
        try:
            if uri is None:
                home.path().mkdir(parents=True, exist_ok=True)
            self.client = mlflow.MlflowClient(tracking_uri=self.uri)
            place = None if uri else (home.path() / "mlartifacts").as_uri()
            self.experiment_id = _experiment(self.client, experiment, place)
        except TrackingError:
            raise
        except Exception as error:
            raise TrackingError(
                f"can't use MLflow at {without_login(self.uri)}: {one_line(error)}; check tracking.uri"
            ) from None

    def parent(self, name: str, params: dict[str, Any], tags: dict[str, str], run_id: str | None = None) -> "Run":
        """A pipeline's run. ``run_id`` reopens an earlier one, if it is there and was of the same params.

        MLflow never lets a param change; a spec that has changed therefore opens a new run.
        """
        flat = flatten(params)
        if run_id and not self._fits(run_id, flat):
            run_id = None
        run = self._open(name, tags, run_id)
        run.params(params)
        return run

    def _open(self, name: str, tags: Mapping[str, str], run_id: str | None) -> "Run":
        try:
            if run_id and self._fits(run_id, {}):
                self.client.update_run(run_id, status="RUNNING")
            else:
                run_id = self.client.create_run(self.experiment_id, run_name=name).info.run_id
        except Exception as error:
            self._trouble(error)
            run_id = None
        run = Run(self, run_id)
        run.tags(tags)
        return run

    def _fits(self, run_id: str, params: dict[str, str]) -> bool:
        try:
            run = self.client.get_run(run_id)
        except Exception:
            return False
        there = run.info.lifecycle_stage == "active" and run.info.experiment_id == self.experiment_id
        return there and all(params.get(key, value) == value for key, value in run.data.params.items())

    def _trouble(self, error: Exception) -> None:
        """Say it once, and leave the server alone for a while, so that retries don't slow the training down."""
        self._silent_until = time.monotonic() + _PAUSE_SECONDS
        if not self._warned:
            self._warned = True
            _log.warning(
                "MLflow at %s has stopped taking what is logged (%s); the work goes on, and the ledger and the "
                "report stay whole",
                without_login(self.uri),
                one_line(error),
            )


def _softly(method: Callable[Concatenate["Run", P], None]) -> Callable[Concatenate["Run", P], None]:
    """Trouble with the server is worth one warning, and is no reason to stop."""

    @functools.wraps(method)
    def wrapped(run: "Run", /, *args: P.args, **kwargs: P.kwargs) -> None:
        if run.run_id is None or time.monotonic() < run.tracker._silent_until:
            return
        try:
            method(run, *args, **kwargs)
        except Exception as error:
            run.tracker._trouble(error)

    return wrapped


class Run:
    """One MLflow run. No method raises because of the server; ``run_id`` is None when it couldn't be opened."""

    def __init__(self, tracker: Tracker, run_id: str | None) -> None:
        self.tracker, self.run_id = tracker, run_id
        self._pending: list[Any] = []
        self._flushed = time.monotonic()
        self._lock = threading.Lock()

    def child(self, name: str, tags: Mapping[str, str] | None = None, run_id: str | None = None) -> "Run":
        """A nested run; ``run_id`` reopens an earlier one."""
        parent = {"mlflow.parentRunId": self.run_id} if self.run_id else {}
        return self.tracker._open(name, {**(tags or {}), **parent}, run_id)

    def metrics(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """Log numbers (None is left out). They are sent about every two seconds, and when the run ends."""
        if self.run_id is None:
            return
        entity, now = mlflow_quietly().entities.Metric, int(time.time() * 1000)
        found = [entity(key_for(k), float(v), now, step or 0) for k, v in values.items() if v is not None]
        with self._lock:
            self._pending = (self._pending + found)[-10 * _PENDING_METRICS :]
            due = time.monotonic() - self._flushed > _FLUSH_SECONDS or len(self._pending) >= _PENDING_METRICS
        if due:
            self._flush()

    @_softly
    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings, flattened to dotted keys. Those that the run has already are left as they are."""
        had = self.tracker.client.get_run(self.run_id).data.params
        entity = mlflow_quietly().entities.Param
        new = [entity(key, value) for key, value in flatten(values).items() if key not in had]
        for some in _batches(new):
            self.tracker.client.log_batch(self.run_id, params=some)

    @_softly
    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags: digests, the stage, what was skipped."""
        entity = mlflow_quietly().entities.RunTag
        clean = [entity(key, value) for key, value in tags_for(values).items()]
        for some in _batches(clean):
            self.tracker.client.log_batch(self.run_id, tags=some)

    @_softly
    def artifact(self, path: Path, folder: str = "") -> None:
        """Upload a file, or all files of a folder."""
        if path.is_dir():
            self.tracker.client.log_artifacts(self.run_id, str(path), folder or None)
        else:
            self.tracker.client.log_artifact(self.run_id, str(path), folder or None)

    @_softly
    def model(
        self,
        folder: Path,
        name: str,
        registered: str | None = None,
        *,
        loader: str,
        packages: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        """Log the model in ``folder`` so that ``mlflow.pyfunc.load_model`` loads it.

        Args:
            registered: also make it the next version of this model in the registry.
            loader: ``module:function`` that loads the folder, see ``model_log.py``.
            packages: what the loader needs; pinned to the versions that are installed here.
            parameters: names and defaults of what ``predict(rows, params=...)`` takes.
        """
        log_model(
            self.tracker.client,
            self.tracker.experiment_id,
            self.run_id,
            folder,
            key_for(name),
            loader=loader,
            packages=packages,
            parameters=parameters or {},
            registered=key_for(registered) if registered else None,
        )

    @_softly
    def model_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the registered versions of this run's models."""
        tag_versions(self.tracker.client, str(self.run_id), tags_for(values))

    def end(self, status: Status = "FINISHED") -> None:
        """Send what is still pending and close the run."""
        self._flush()
        self._terminate(status)

    @_softly
    def _terminate(self, status: Status) -> None:
        self.tracker.client.set_terminated(self.run_id, status)

    @_softly
    def _flush(self) -> None:
        with self._lock:
            sending, self._pending, self._flushed = self._pending, [], time.monotonic()
        try:
            for some in _batches(sending, _PENDING_METRICS):
                self.tracker.client.log_batch(self.run_id, metrics=some)
        except Exception:
            with self._lock:
                self._pending = sending + self._pending
            raise


def open_command(uri: str | None, home: Folder) -> str:
    """The one command that opens MLflow's pages for what was logged."""
    if uri and uri.startswith("http"):
        return f"{_program('python')} -m webbrowser {shlex.quote(without_login(uri))}"
    return f"{_program('mlflow')} ui --backend-store-uri {shlex.quote(without_login(uri or local_uri(home)))}"


@functools.cache
def mlflow_quietly() -> Any:
    """MLflow, imported at the first use: quiet, without its usage statistics, and giving up on a dead server soon."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_UV_AUTO_DETECT": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }.items():
        os.environ.setdefault(name, value)
    import mlflow
    import mlflow.entities
    import mlflow.models

    return mlflow


def _experiment(client: Any, name: str, place: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except Exception:  # another pipeline may have made it a moment ago
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(f"MLflow's experiment {name!r} was deleted: restore it, or give tracking.experiment")
    return str(found.experiment_id)


def local_uri(home: Folder) -> str:
    """The database that stands in for a server, in the folder ``home``."""
    return f"sqlite:///{home.path() / 'mlflow.db'}"


def _batches(items: list[Any], size: int = _BATCH) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _program(name: str) -> str:
    """``name`` as it can be typed here: bare where the shell would find it, else beside this Python."""
    beside = Path(sys.executable).parent / name
    if shutil.which(name) == str(beside) or not beside.exists():
        return name
    return shlex.quote(os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside))
