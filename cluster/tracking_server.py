"""Where MLflow is, and how it is spoken to: a server, or a database beside the workdir."""

import functools
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from cluster.errors import TrackingError
from cluster.files import Folder
from cluster.logged import one_line, without_login

_LOGIN_CODES = {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"}
_LOGIN = (
    "give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment, "
    "of somebody who may write there"
)


def server(uri: str | None) -> str | None:
    """The address that ``tracking.uri`` gives, or the environment; None for the database beside the workdir."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or None


def local_uri(home: Folder) -> str:
    """The database that stands in for a server, in the folder ``home``."""
    return f"sqlite:///{home.path() / 'mlflow.db'}"


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
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        # The outbox tries again by itself, and asks first what the try before has done.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    }.items():
        os.environ.setdefault(name, value)
    import mlflow
    import mlflow.entities
    import mlflow.models

    return mlflow


def experiment_of(client: Any, name: str, place: str | None) -> Any:
    """The experiment of a name; made, with its artifacts at ``place``, if it isn't there.

    Raises:
        TrackingError: it was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.get_experiment(client.create_experiment(name, artifact_location=place))
        except Exception:  # another pipeline may have made it a moment ago
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(f"MLflow's experiment {name!r} was deleted: restore it, or give tracking.experiment")
    return found


def refuses_login(error: BaseException) -> bool:
    """Whether it is the login that the server doesn't accept."""
    return getattr(error, "error_code", None) in _LOGIN_CODES


def unusable(uri: str, error: BaseException) -> TrackingError:
    """What to tell of a server that can't be used."""
    where, told = without_login(uri), one_line(error)
    if refuses_login(error):
        return TrackingError(f"MLflow at {where} refuses the login: {_LOGIN} ({told})")
    return TrackingError(f"can't use MLflow at {where}: {told}; check tracking.uri")


def _program(name: str) -> str:
    """``name`` as it can be typed here: bare where the shell would find it, else beside this Python."""
    beside = Path(sys.executable).parent / name
    if shutil.which(name) == str(beside) or not beside.exists():
        return name
    return shlex.quote(os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside))
