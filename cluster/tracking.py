"""MLflow: a parent run, a nested run per stage, metrics, artifacts and models.

It fails loudly at the start, when there is still nothing to lose. Later nothing here waits for the server or raises
because of it: what is logged goes through an outbox, see ``outbox.py``, which keeps it in the workdir while the server
is away. MLflow is imported when a ``Tracker`` is made, since that takes seconds. Nothing here uses MLflow's global
state, so that several runs can be open at once.
"""

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cluster.delivery import Delivery, fingerprint, is_final
from cluster.errors import TrackingError
from cluster.files import Folder
from cluster.logged import flatten, key_for, one_line, tags_for, without_login
from cluster.outbox import OUTBOX, Outbox
from cluster.outbox_batch import Entry
from cluster.run_book import PIPELINE, RunBook, is_pending
from cluster.standing import STANDING
from cluster.tracking_server import experiment_of, local_uri, mlflow_quietly, refuses_login, unusable

__all__ = ["Run", "Status", "Tracker", "flatten", "owes"]

Status = Literal["FINISHED", "FAILED", "KILLED"]

_log = logging.getLogger(__name__)
_TRIES, _PAUSE_SECONDS = 3, 1.0  # at the start


class Tracker:
    """One MLflow experiment, and what a workdir's work logs to it.

    Args:
        uri: the tracking server; None for a SQLite database ``mlflow.db`` and a folder ``mlartifacts`` in ``home``.
        experiment: its name; made if it isn't there.
        home: a local folder, used only when ``uri`` is None.
        workdir: ``tracking.json`` there says which runs are its, ``outbox/`` holds what the server hasn't taken yet;
            models and artifacts are files in it.

    Raises:
        TrackingError: the server can't be reached, or the experiment can't be used. A server that this workdir has
            used before may be away: then what is logged waits.
    """

    def __init__(self, uri: str | None, experiment: str, home: Folder, workdir: Folder) -> None:
        if uri is None and not home.is_local:
            raise TrackingError(
                f"{home} is not on this machine, so MLflow's database can't lie there: give tracking.uri"
            )
        self.uri, self.workdir = uri or local_uri(home), workdir
        self.book = RunBook(workdir)
        self._warned = False
        mlflow = mlflow_quietly()
        try:
            if uri is None:
                home.path().mkdir(parents=True, exist_ok=True)
            self.client = mlflow.MlflowClient(tracking_uri=self.uri)
        except Exception as error:
            raise unusable(self.uri, error) from None
        folder = workdir / OUTBOX
        self._delivery = Delivery(self.client, self.book, workdir, folder)
        self.away = not self._reached(experiment, None if uri else (home.path() / "mlartifacts").as_uri())
        place = dict(self.book.place or {})
        self.experiment_id = str(place["id"])
        self.outbox = Outbox(folder, self._delivery, place, self.book.save, self._trouble)

    def _reached(self, experiment: str, place: str | None) -> bool:
        """Ask for the experiment, and know it from now on; False if the server is away and was used before."""
        known, where = self.book.place or {}, without_login(self.uri)
        expected = self.book.resumed and known.get("name") == experiment and known.get("server") == where
        for left in reversed(range(_TRIES)):
            try:
                found = self._delivery.trust(experiment_of(self.client, experiment, place))
                self.book.settle({**found, "server": where})
                return True
            except TrackingError:
                raise
            except Exception as error:
                if refuses_login(error) or is_final(error) or not (left or expected):
                    raise unusable(self.uri, error) from None
                if not left:
                    self._trouble(error)
            if left:
                time.sleep(_PAUSE_SECONDS)
        return False

    def parent(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> "Run":
        """The pipeline's run: the workdir's earlier one, if it is there and was of the same params, else a new one.

        MLflow never lets a param change; a spec that has changed therefore opens a new run.

        Raises:
            TrackingError: the server refuses it, in a workdir's first command.
        """
        flat, known = flatten(params), self.book.known(PIPELINE)
        handle = self.book.begin(flat, known if known and self._fits(known, flat) else None)
        run, entry = Run(self, handle), self._opening(handle, name, tags, None)
        if is_pending(handle) and not self.outbox.waiting() and not self.away:
            # At once: a server that lets one read may still refuse what is written.
            try:
                self._delivery.deliver(entry, False)
            except Exception as error:
                if refuses_login(error):
                    raise unusable(self.uri, error) from None
                self.outbox.post({**entry, "again": True})
        else:
            self.outbox.post(entry)
        run.params(params)
        return run

    def close(self, patience: float, uploads: bool = True) -> str:
        """Send what is left, as long as the server takes it, and write down the rest.

        Args:
            patience: seconds without anything taken after which the rest is left for the next time.
            uploads: wait for the end of one that is under way.

        Returns:
            what waits and why, as the beginning of a sentence; empty if nothing does.
        """
        left = 0
        try:
            left = self.outbox.drain(patience, uploads)
        finally:
            try:
                self.outbox.close()
            except Exception as error:
                _log.warning(
                    "what MLflow hasn't taken can't be written to %s/%s (%s)", self.workdir, OUTBOX, one_line(error)
                )
        where = without_login(self.uri)
        if not left:
            return ""
        if held := self.outbox.held():
            return (
                f"{held} of {left} files in {self.workdir}/{OUTBOX} can't be read or belong to another server than "
                f"MLflow at {where}: give that one as tracking.uri"
            )
        return f"MLflow at {where} has not taken all that was logged; the rest waits in {self.workdir}/{OUTBOX}"

    def _opening(self, handle: str, name: str, tags: Mapping[str, str], parent: str | None) -> Entry:
        return {
            "do": "open",
            "run": handle,
            "name": name,
            "experiment": self.experiment_id,
            "tags": tags_for(tags),
            "start": _now(),
            "parent": parent,
        }

    def _fits(self, handle: str, params: Mapping[str, str]) -> bool:
        if is_pending(handle) or self.away:
            return self.book.same_params(params)
        try:
            run = self.client.get_run(handle)
        except Exception:
            return False
        there = run.info.lifecycle_stage == "active" and run.info.experiment_id == self.experiment_id
        return there and all(params.get(key, value) == value for key, value in run.data.params.items())

    def _trouble(self, error: Exception | None) -> None:
        """Say once that the server is away, and once that it is back."""
        where = without_login(self.uri)
        if error is None:
            if self._warned:
                _log.warning("MLflow at %s answers again, and gets what has waited", where)
            self.away = self._warned = False
        elif not self._warned:
            self._warned = True
            STANDING.survived("tracking_outages")
            _log.warning(
                "MLflow at %s has stopped taking what is logged (%s); the work goes on, what is logged is kept in "
                "%s/%s and sent when it answers",
                where,
                one_line(error),
                self.workdir,
                OUTBOX,
            )


class Run:
    """One MLflow run. No method waits for the server or raises because of it.

    Attributes:
        handle: what stands for the run also before the server has made it.
    """

    def __init__(self, tracker: Tracker, handle: str) -> None:
        self.tracker, self.handle = tracker, handle

    @property
    def run_id(self) -> str | None:
        """The server's id; None as long as it hasn't made the run."""
        return self.tracker.book.run_id(self.handle)

    def child(self, name: str, tags: Mapping[str, str] | None = None) -> "Run":
        """A nested run: the one of this name that was opened before, or a new one."""
        handle = self.tracker.book.nested(name)
        self.tracker.outbox.post(self.tracker._opening(handle, name, tags or {}, self.handle))
        return Run(self.tracker, handle)

    def metrics(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """Log numbers (None is left out) with the present time."""
        now = _now()
        # As text: JSON has no word for what is not a number.
        points = [[key_for(k), repr(float(v)), now, step or 0] for k, v in values.items() if v is not None]
        if points:
            self._post("metrics", points=points)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings, flattened to dotted keys. Those that the run has already are left as they are."""
        self._post("params", values=flatten(values))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags: digests, the stage, what was skipped."""
        self._post("tags", values=tags_for(values))

    def artifact(self, name: str, into: str = "") -> None:
        """Upload the file ``name`` of the workdir as it is now; ``into`` is a folder of the run's artifacts."""
        self._post("artifact", name=name, into=into, data=self.tracker.workdir.read(name), upload=True)

    def model(
        self,
        folder: str,
        name: str,
        registered: str | None = None,
        *,
        loader: str,
        packages: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        """Log the model in a folder of the workdir so that ``mlflow.pyfunc.load_model`` loads it.

        Args:
            folder: its name in the workdir. It is uploaded in the background, or later, if it hasn't changed then.
            registered: also make it the next version of this model in the registry.
            loader: ``module:function`` that loads the folder, see ``model_log.py``.
            packages: what the loader needs; pinned to the versions that are installed here.
            parameters: names and defaults of what ``predict(rows, params=...)`` takes.
        """
        self._post(
            "model",
            experiment=self.tracker.experiment_id,
            folder=folder,
            files=fingerprint(self.tracker.workdir / folder),
            name=key_for(name),
            registered=key_for(registered) if registered else None,
            loader=loader,
            packages=list(packages),
            parameters=dict(parameters or {}),
            key=uuid.uuid4().hex,
            upload=True,
        )

    def model_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags of the registered versions of this run's models."""
        self._post("model_tags", values=tags_for(values), after=True)

    def end(self, status: Status = "FINISHED") -> None:
        """Close the run."""
        self._post("end", status=status, end=_now())

    def _post(self, do: str, **what: Any) -> None:
        self.tracker.outbox.post({"do": do, "run": self.handle, **what})


def owes(workdir: Folder) -> bool:
    """Whether an earlier command has left in the workdir what its server hadn't taken."""
    return bool((workdir / OUTBOX).names(".json"))


def _now() -> int:
    """Milliseconds since the epoch."""
    return int(time.time() * 1000)
