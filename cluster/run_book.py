"""Which runs of the tracking server a workdir's work has: ``tracking.json``, name by name.

A run that the server hasn't made yet has a handle of ours in place of its id. The run carries the handle as a tag when
it is made, so that whoever lost the server's answer finds it again.
"""

import threading
import uuid
from collections.abc import Mapping
from typing import Any

from cluster.errors import FileError
from cluster.files import Folder, digest

RUNS = "tracking.json"
PIPELINE = "pipeline"
HANDLE_TAG = "tracking.handle"
_PENDING = "pending-"
_PLACE, _PARAMS = "experiment", "params"


def is_pending(handle: str) -> bool:
    """Whether a run had not been made when this was written."""
    return handle.startswith(_PENDING)


class RunBook:
    """Names → handles, safe to use from several threads. Nothing is written before ``save``.

    Attributes:
        place: the experiment as the server knows it (``id``, ``name``, ``created`` in milliseconds) and the server's
            address without a login; None before the first one was reached.
    """

    def __init__(self, workdir: Folder) -> None:
        self._workdir, self._lock, self._saving = workdir, threading.RLock(), threading.Lock()
        self._dirty = False
        self._made: dict[str, str] = {}
        try:
            found = workdir.read_json(RUNS) if workdir.exists(RUNS) else {}
        except FileError:
            found = {}  # damaged: the runs are lost to it, and new ones are opened
        found = found if isinstance(found, dict) else {}
        self.place: dict[str, Any] | None = found.pop(_PLACE, None)
        self._params: str | None = found.pop(_PARAMS, None)
        self._runs = {str(name): str(handle) for name, handle in found.items() if handle}

    @property
    def resumed(self) -> bool:
        """Whether an earlier command has tracked this workdir's work and said where."""
        return PIPELINE in self._runs and self.place is not None

    def known(self, name: str) -> str | None:
        """The handle of a run that was opened before."""
        return self._runs.get(name)

    def same_params(self, params: Mapping[str, str]) -> bool:
        """Whether the pipeline's run was of these params, as far as is known here."""
        return self._params == digest(dict(params))

    def settle(self, place: dict[str, Any]) -> None:
        """Know where the work is tracked; runs of another place are forgotten."""
        with self._lock:
            if self.place is not None and not same_place(self.place, place):
                self._runs, self._params = {}, None
            self._dirty = self._dirty or self.place != place
            self.place = place

    def begin(self, params: Mapping[str, str], handle: str | None) -> str:
        """The pipeline's handle: the one given, or a new one; the nested runs of another pipeline's are forgotten."""
        with self._lock:
            if handle is None or handle != self._runs.get(PIPELINE):
                self._runs = {PIPELINE: handle or _new()}
            self._params, self._dirty = digest(dict(params)), True
            return self._runs[PIPELINE]

    def nested(self, name: str) -> str:
        """The handle of a nested run: the known one, or a new one."""
        with self._lock:
            if name not in self._runs:
                self._runs[name], self._dirty = _new(), True
            return self._runs[name]

    def made(self, handle: str, run_id: str) -> None:
        """The server has made the run, or it is another one now that stands for the handle."""
        with self._lock:
            self._made[handle] = run_id
            self._runs = {name: run_id if there == handle else there for name, there in self._runs.items()}
            self._dirty = True

    def run_id(self, handle: str) -> str | None:
        """The server's id of a run; None where it isn't known here."""
        return self._made.get(handle) or (None if is_pending(handle) else handle)

    def save(self) -> None:
        """Write what has changed."""
        with self._saving:
            with self._lock:
                content: dict[str, Any] = {**self._runs, _PLACE: self.place, _PARAMS: self._params}
                dirty, self._dirty = self._dirty, False
            if not dirty:
                return
            try:
                self._workdir.write_json(RUNS, {key: value for key, value in content.items() if value})
            except BaseException:
                self._dirty = True
                raise


def same_place(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two experiments are one, whatever it is called now and the address of its server has become."""
    return all(one.get(key) == other.get(key) for key in ("id", "created"))


def _new() -> str:
    return f"{_PENDING}{uuid.uuid4().hex}"
