"""Entries of the outbox into MLflow, each such that a second time changes nothing.

A run carries the handle that it had before it was made, and a model that of its entry, as tags: what was made although
its answer was lost is found again by them. MLflow's databases keep one point for equal (key, step, time, value).
"""

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyarrow import fs

from cluster.errors import FileError
from cluster.faults import patiently
from cluster.files import Folder, fetch, filesystem
from cluster.logged import one_line
from cluster.model_log import log_model, tag_versions
from cluster.outbox_batch import ElsewhereError, Entry, RefusedError
from cluster.run_book import HANDLE_TAG, RunBook, same_place

_METRICS, _BATCH = 1000, 100  # MLflow's limits of one request: metrics; params or tags
# What a server answers that has understood and will not change its mind.
_FINAL = {
    "INVALID_PARAMETER_VALUE",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "NOT_FOUND",
    "FEATURE_DISABLED",
    "NOT_IMPLEMENTED",
}
_FINAL_STATUS = {400, 404, 405, 413, 414, 422}


class Delivery:
    """Carries entries to one MLflow server.

    Args:
        client: an ``MlflowClient``.
        workdir: what entries refer to lies there.
        outbox: where the contents of small files wait.
    """

    def __init__(self, client: Any, book: RunBook, workdir: Folder, outbox: Folder) -> None:
        self.client, self.book, self.workdir, self.outbox = client, book, workdir, outbox
        self._known: list[Any] = []

    def trust(self, experiment: Any) -> dict[str, Any]:
        """Know an experiment to be this server's; returns what it is known by."""
        place = {"id": str(experiment.experiment_id), "name": experiment.name, "created": experiment.creation_time}
        self._known.append(place)
        return place

    def arrive(self, place: Any) -> None:
        """Ask, once, whether the experiment is the one that entries were written for."""
        if any(same_place(place, known) for known in self._known):
            return
        try:
            found = self.client.get_experiment(str(place["id"]))
        except Exception as error:
            if is_final(error):
                raise ElsewhereError from None
            raise
        if not same_place(self.trust(found), place):
            raise ElsewhereError

    def answers(self) -> bool:
        """Whether the server answers what needs its database alone."""
        try:
            self.client.get_experiment(str(self._known[0]["id"]))
        except Exception:
            return False
        return True

    def deliver(self, entry: Entry, again: bool) -> None:
        """Do what ``entry`` says; see ``Carrier``."""
        try:
            DO[entry["do"]](self, entry, again)
        except RefusedError:
            raise
        except Exception as error:
            if is_final(error):
                raise RefusedError(one_line(error)) from None
            raise

    def open(self, entry: Entry, again: bool) -> None:
        """Make the run, or open it again; its parent, if it has one, was made before it."""
        handle, parent = entry["run"], entry.get("parent")
        run_id = self.book.run_id(handle) or (self._find(handle) if again else None)
        if run_id is None or not self._active(run_id):
            tags = {**entry["tags"], HANDLE_TAG: handle}
            if parent and (parent_id := self.book.run_id(parent) or self._find(parent)):
                tags["mlflow.parentRunId"] = parent_id
            made = self.client.create_run(entry["experiment"], entry["start"], tags, entry["name"])
            run_id = str(made.info.run_id)
        else:
            self.client.update_run(run_id, status="RUNNING")
            self._tag(run_id, entry["tags"])
        self.book.made(handle, run_id)

    def metrics(self, entry: Entry, _: bool) -> None:
        from mlflow.entities import Metric

        points = [Metric(key, float(value), int(when), int(step)) for key, value, when, step in entry["points"]]
        run_id = self._run(entry)
        for i in range(0, len(points), _METRICS):
            self.client.log_batch(run_id, metrics=points[i : i + _METRICS])

    def params(self, entry: Entry, _: bool) -> None:
        """Params that the run has already are left as they are: MLflow never lets one change."""
        from mlflow.entities import Param

        run_id = self._run(entry)
        had = self.client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in entry["values"].items() if key not in had]
        for i in range(0, len(new), _BATCH):
            self.client.log_batch(run_id, params=new[i : i + _BATCH])

    def tags(self, entry: Entry, _: bool) -> None:
        self._tag(self._run(entry), entry["values"])

    def artifact(self, entry: Entry, _: bool) -> None:
        data = entry["data"]
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, Path(entry["name"]).name)
            path.write_bytes(data if isinstance(data, bytes) else self._kept(data))
            self.client.log_artifact(self._run(entry), str(path), entry["into"] or None)

    def model(self, entry: Entry, again: bool) -> None:
        """The folder is referred to, and must be as it was when the model was logged."""
        folder = self.workdir / _inside(entry["folder"])
        if fingerprint(folder) != entry["files"]:
            raise RefusedError(f"{folder} has changed since")
        with tempfile.TemporaryDirectory() as scratch:
            here = folder.path() if folder.is_local else Path(scratch)
            if not folder.is_local:
                fetch(folder, here)
            log_model(
                self.client,
                entry["experiment"],
                self._run(entry),
                here,
                entry["name"],
                loader=entry["loader"],
                packages=entry["packages"],
                parameters=entry["parameters"],
                registered=entry["registered"],
                key=entry["key"],
                again=again,
            )

    def model_tags(self, entry: Entry, _: bool) -> None:
        tag_versions(self.client, self._run(entry), entry["values"])

    def end(self, entry: Entry, _: bool) -> None:
        self.client.set_terminated(self._run(entry), entry["status"], entry["end"])

    def _run(self, entry: Entry) -> str:
        handle = entry["run"]
        run_id = self.book.run_id(handle) or self._find(handle)
        if run_id is None:
            raise RefusedError("its run is not there")
        return run_id

    def _find(self, handle: str) -> str | None:
        """The run that was made for a handle."""
        if not re.fullmatch(r"[\w-]+", handle):
            return None
        experiments = [str(place["id"]) for place in self._known]
        for run in self.client.search_runs(experiments, f"tags.`{HANDLE_TAG}` = '{handle}'", max_results=1):
            self.book.made(handle, str(run.info.run_id))
            return str(run.info.run_id)
        return None

    def _active(self, run_id: str) -> bool:
        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except Exception as error:
            if is_final(error):
                return False
            raise

    def _tag(self, run_id: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in values.items()]
        for i in range(0, len(tags), _BATCH):
            self.client.log_batch(run_id, tags=tags[i : i + _BATCH])

    def _kept(self, name: Any) -> bytes:
        data = self.outbox.find(_inside(name))
        if data is None:
            raise RefusedError(f"{self.outbox}/{name} is missing")
        return data


DO: dict[str, Callable[[Delivery, Entry, bool], None]] = {
    "open": Delivery.open,
    "metrics": Delivery.metrics,
    "params": Delivery.params,
    "tags": Delivery.tags,
    "artifact": Delivery.artifact,
    "model": Delivery.model,
    "model_tags": Delivery.model_tags,
    "end": Delivery.end,
}


def fingerprint(folder: Folder) -> dict[str, list[int]]:
    """Size in bytes and time of change in nanoseconds of each file of a folder, all levels."""
    system, root = filesystem(folder.uri)
    below = fs.FileSelector(root, recursive=True, allow_not_found=True)
    found = [info for info in patiently(folder.uri, lambda: system.get_file_info(below)) if info.is_file]
    return {info.path.removeprefix(root).lstrip("/"): [info.size, info.mtime_ns] for info in found}


def is_final(error: BaseException) -> bool:
    """Whether trying again is of no use."""
    code = getattr(error, "error_code", None)
    if code is not None:
        return code in _FINAL
    answer = getattr(error, "response", None)
    if answer is not None:
        return getattr(answer, "status_code", 0) in _FINAL_STATUS
    # What can't be read, or isn't what it should be. An OSError can be a ValueError, and is trouble with the network.
    return isinstance(error, FileError | TypeError | ValueError | LookupError) and not isinstance(error, OSError)


def _inside(name: Any) -> str:
    """``name`` if it stays within its folder."""
    if not isinstance(name, str) or name.startswith("/") or not {"..", ""}.isdisjoint(name.split("/")):
        raise RefusedError(f"{name!r} is no file of the workdir")
    return name
