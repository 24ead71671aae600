"""A real MLflow server as a team runs it: PostgreSQL behind it, artifacts on the S3 protocol, and logins on."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from fault_proxy import FaultProxy

from cluster.files import Folder

USER, PASSWORD = "admin", "correct horse battery"
_PACKAGE = Path("/usr/lib/postgresql")


def postgres_programs() -> Path | None:
    """Where Debian's package has put PostgreSQL's programs; None where it isn't installed."""
    found = sorted(_PACKAGE.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class Postgres:
    """A cluster of its own in a temporary folder, reached by a Unix socket alone. Root runs it as somebody else."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path must be short
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self.folder, self._user)
        self._call("initdb", "--auth=trust", "--username=mlflow", "--no-sync", "-D", self.folder / "data")
        self.uri = f"postgresql://mlflow@/postgres?host={self.folder}"
        self.start()

    def start(self) -> None:
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c fsync=off"
        self._call("pg_ctl", "start", "-w", "-D", self.folder / "data", "-l", self.folder / "log", "-o", options)

    def stop(self) -> None:
        """At once: connections are cut."""
        self._call("pg_ctl", "stop", "-w", "-m", "immediate", "-D", self.folder / "data")

    def remove(self) -> None:
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _call(self, program: str, *arguments: Any) -> None:
        done = subprocess.run(
            [str(self._programs / program), *map(str, arguments)],
            user=self._user or getpass.getuser() if os.geteuid() == 0 else None,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


class MlflowServer:
    """``mlflow server`` as a process group of its own.

    Args:
        store: the address of its database.
        artifacts: where it puts what it is sent; the environment says how to get there.
        login: ask for ``USER`` and ``PASSWORD``.
    """

    def __init__(self, folder: Path, store: str, artifacts: str, *, login: bool = False) -> None:
        self._folder, self._store, self._artifacts, self._login = folder, store, artifacts, login
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        own = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        more = []
        if self._login:
            config = self._folder / "auth.ini"
            auth = [
                "[mlflow]",
                "default_permission = READ",
                f"database_uri = sqlite:///{self._folder}/auth.db",
                f"admin_username = {USER}",
                "auth_cache_ttl_seconds = 60",
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
            ]
            config.write_text("\n".join(auth))
            own |= {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": "for tests"}
            own |= {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD}
            more = ["--app-name", "basic-auth"]
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", self._store, "--artifacts-destination", self._artifacts]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *more],
                env={name: v for name, v in os.environ.items() if name != "MLFLOW_TRACKING_URI"} | own,
                cwd=self._folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait()

    def kill(self) -> None:
        """SIGKILL to the server and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _wait(self) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert self._process is not None and self._process.poll() is None, (self._folder / "log").read_text()
            try:
                urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except HTTPError:
                return  # it answers
            except OSError:
                time.sleep(0.1)
        raise AssertionError((self._folder / "log").read_text())


@dataclass
class Team:
    """What a team runs; ``proxy`` stands before its server."""

    postgres: Postgres
    server: MlflowServer
    proxy: FaultProxy
    bucket: Folder


@contextmanager
def team(folder: Path, bucket: Folder) -> Iterator[Team]:
    """Such a server, whose login the environment has meanwhile; the test is skipped where PostgreSQL isn't."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL isn't installed here (Debian's package postgresql)")
    postgres = Postgres(programs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_S3_ENDPOINT_URL", os.environ["AWS_ENDPOINT_URL"])
        patch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        patch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        server = MlflowServer(folder, postgres.uri, f"{bucket}/mlflow", login=True)
        try:
            server.start()
            proxy = FaultProxy("127.0.0.1", server.port)
            yield Team(postgres, server, proxy, bucket)
            proxy.stop()
        finally:
            server.kill()
            postgres.remove()
