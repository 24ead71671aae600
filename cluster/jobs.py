"""Ray Jobs: submit, follow, list, stop. Speaks with the dashboard of a cluster's head, as ``http://head:8265``.

Ray's token comes from where Ray itself looks for it: ``RAY_AUTH_TOKEN``, the file that ``RAY_AUTH_TOKEN_PATH`` names,
or ``~/.ray/auth_token``.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cluster.errors import JobError

T = TypeVar("T")

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
_PENDING, _OVER = "PENDING", ("STOPPED", "SUCCEEDED", "FAILED")
_POLL_SECONDS, _AWAY_SECONDS = 1.0, 120.0
# For how long a job that is to stop may tidy up before it is killed; Ray's own three seconds end no run in MLflow.
STOP_SECONDS = 60
_LEFT_OUT = ["**/__pycache__", "**/*.pyc"]


@dataclass(frozen=True)
class Job:
    """A job as the cluster knows it.

    Attributes:
        status: ``PENDING``, ``RUNNING``, ``STOPPED``, ``SUCCEEDED`` or ``FAILED``.
        message: what Ray says of its state.
        metadata: what was given at submission.
        started, ended: seconds since the epoch; None as long as it hasn't.
        exit_code: of its command, once that has ended.
    """

    id: str
    status: str
    message: str
    metadata: Mapping[str, str]
    started: float | None
    ended: float | None
    exit_code: int | None

    @property
    def over(self) -> bool:
        """Whether nothing of it runs any more, or ever will."""
        return self.status in _OVER

    @property
    def waiting(self) -> bool:
        """Whether it has not begun yet."""
        return self.status == _PENDING


class Jobs:
    """The jobs of one cluster.

    Args:
        address: of the dashboard; by default ``RAY_API_SERVER_ADDRESS``, else the usual port of this machine.

    Every method raises JobError, in one sentence, when the cluster can't be reached or refuses.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS).rstrip("/")
        if not self.address.startswith(("http://", "https://")):
            raise JobError(f"--address takes the dashboard of the cluster's head, as http://head:8265, not {address}")

    @cached_property
    def _client(self) -> Any:
        from ray.job_submission import JobSubmissionClient

        token = _token()
        # Ray lets these overrule an address that was given.
        before = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
        try:
            with self._told():
                return JobSubmissionClient(
                    self.address,
                    headers={"Authorization": f"Bearer {token}"} if token else None,
                    verify=os.environ.get("SSL_CERT_FILE") or True,
                )
        finally:
            os.environ.update(before)

    def submit(
        self,
        command: str,
        folder: Path,
        *,
        job_id: str,
        metadata: Mapping[str, str],
        env: Mapping[str, str],
        modules: Sequence[Path] = (),
        cpus: float = 0.0,
        resources: Mapping[str, float] | None = None,
    ) -> str:
        """Start a job, and return its id.

        Args:
            command: runs in a copy of ``folder``, on the head unless it holds ``cpus`` or ``resources``.
            env: for the command and every worker; anyone who may see the dashboard sees it, so no secrets.
            modules: packages to import from copies that travel with the job, before what the nodes have installed.
        """
        runtime: dict[str, Any] = {
            "working_dir": str(folder),
            "excludes": _LEFT_OUT,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **env},
        }
        if modules:
            runtime["py_modules"] = [str(module) for module in modules]
        with self._told(), _quietly():
            return str(
                self._client.submit_job(
                    entrypoint=command,
                    submission_id=job_id,
                    runtime_env=runtime,
                    metadata=dict(metadata),
                    entrypoint_num_cpus=cpus or None,
                    entrypoint_resources=dict(resources) if resources else None,
                )
            )

    def get(self, job_id: str) -> Job:
        """One job."""
        with self._told(job_id):
            return _job(self._client.get_job_info(job_id))

    def all(self) -> list[Job]:
        """All jobs that were submitted, the latest first."""
        with self._told():
            found = [_job(each) for each in self._client.list_jobs() if each.submission_id]
        return sorted(found, key=lambda job: job.started or 0.0, reverse=True)

    def nodes(self) -> list[Mapping[str, float]]:
        """What each node has in all, by Ray's names."""
        with self._told():
            answer = self._client._do_request("GET", "/api/v0/nodes")  # the client has no method for nodes
            answer.raise_for_status()
            found = answer.json()["data"]["result"]["result"]
        return [dict(node["resources_total"]) for node in found if node["state"] == "ALIVE"]

    def logs(self, job_id: str) -> str:
        """All that the job has printed so far."""
        with self._told(job_id):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Write what the job prints, from its first line on, until it is over.

        A connection that breaks is made again, for two minutes.
        """
        shown = 0
        while True:
            passed = 0

            def on_text(text: str) -> None:
                # After a break the server begins at the first line again.
                nonlocal shown, passed
                new = text[max(0, shown - passed) :]
                passed += len(text)
                shown = max(shown, passed)
                if new:
                    write(new)

            with _quietly():
                asyncio.run(self._tail(job_id, on_text))
            if self._patiently(lambda: self.get(job_id)).over:
                break
            time.sleep(_POLL_SECONDS)
        rest = self._patiently(lambda: self.logs(job_id))[shown:]
        if rest:
            write(rest)
        return self.get(job_id)

    def wait(self, job_id: str) -> Job:
        """Wait until a job is over."""
        while not (job := self._patiently(lambda: self.get(job_id))).over:
            time.sleep(_POLL_SECONDS / 2)
        return job

    async def _tail(self, job_id: str, on_text: Callable[[str], None]) -> None:
        import aiohttp

        try:
            async for text in self._client.tail_job_logs(job_id):
                on_text(text)
        except (aiohttp.ClientError, RuntimeError, OSError, TimeoutError):
            return

    def _patiently(self, ask: Callable[[], T]) -> T:
        end = time.monotonic() + _AWAY_SECONDS
        while True:
            try:
                return ask()
            except JobError:
                if time.monotonic() > end:
                    raise
            time.sleep(2 * _POLL_SECONDS)

    def stop(self, job_id: str) -> Job:
        """Have a job stop, and wait until it has: it gets SIGTERM, and a minute to commit and tidy up."""
        with self._told(job_id):
            self._client.stop_job(job_id)
        end = time.monotonic() + STOP_SECONDS + 30
        while not (job := self.get(job_id)).over:
            if time.monotonic() > end:
                raise JobError(f"{job_id} does not stop; look at `distill jobs logs {job_id}`, and at the cluster")
            time.sleep(_POLL_SECONDS / 2)
        return job

    @contextmanager
    def _told(self, job_id: str = "") -> Iterator[None]:
        """What Ray's client and the network raise, as one sentence."""
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError:
            raise JobError(
                f"the cluster at {self.address} wants Ray's token, and the one here is missing or wrong: set "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
            ) from None
        except requests.exceptions.SSLError as error:
            raise JobError(
                f"the certificate of {self.address} can't be checked ({_short(error)}): set SSL_CERT_FILE to the "
                "authority's certificates"
            ) from None
        except (ConnectionError, requests.exceptions.RequestException) as error:
            raise JobError(
                f"no Ray dashboard answers at {self.address} ({_short(error)}): check --address, and that the head's "
                "port 8265 can be reached from here"
            ) from None
        except (RuntimeError, ValueError) as error:
            if job_id and "404" in str(error):
                raise JobError(f"no job {job_id} at {self.address}; `distill jobs list` shows those it has") from None
            raise JobError(f"the cluster at {self.address} refused: {_short(error)}") from None


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Ray's lines about each package that it uploads, and each connection that ends."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _token() -> str | None:
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"can't read Ray's token from {path}: {_short(error)}") from None


def _job(details: Any) -> Job:
    return Job(
        id=str(details.submission_id),
        status=str(details.status.value if hasattr(details.status, "value") else details.status),
        message=str(details.message or ""),
        metadata=dict(details.metadata or {}),
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
    )


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
