"""The shared MLflow's own script, served for real: PostgreSQL, an object store, and logins."""

import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import boto3
import pytest
from tools import INFRA, run

MLFLOW = INFRA / "mlflow"
FILES = {
    "PGPASSWORD": "postgres_password",
    "AWS_ACCESS_KEY_ID": "storage_key",
    "AWS_SECRET_ACCESS_KEY": "storage_secret",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "admin_password",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "session_key",
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def postgres(password: str) -> Iterator[int]:
    """A PostgreSQL of Debian's package, with one user, mlflow, who needs the password: its port."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found or os.getuid() != 0:
        pytest.skip("this machine has no PostgreSQL that a test may start as its own user")
    # Not below pytest's own folder, into which nobody else may look.
    programs, port, folder = found[-1], free_port(), tempfile.mkdtemp()
    (Path(folder) / "password").write_text(password)
    shutil.chown(folder, "postgres")

    def do(program: str, *options: str, **settings: Any) -> None:
        command = [str(programs / program), *options]
        subprocess.run(command, check=True, cwd=folder, timeout=120, stdout=subprocess.DEVNULL, **settings)

    do("initdb", "-D", "data", "-U", "mlflow", "-A", "scram-sha-256", "--pwfile=password", user="postgres")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        do("pg_ctl", "-D", "data", "-o", options, "-l", "log", "-w", "start", user="postgres")
        login = os.environ | {"PGPASSWORD": password}
        do("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow", env=login)
        yield port
    finally:
        do("pg_ctl", "-D", "data", "-m", "fast", "-w", "stop", user="postgres")
        shutil.rmtree(folder, ignore_errors=True)


def status(url: str, login: str | None = None, host: str | None = None) -> int:
    headers = {"Host": host} if host else {}
    if login:
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    try:
        with urlopen(Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code
    except (URLError, OSError):
        return 0


LOG = """
import sys, mlflow
mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_experiment("tried")
with mlflow.start_run() as run:
    mlflow.log_metric("cost/usd", 1.0)
    mlflow.log_text("a report", "report.html")
print(mlflow.artifacts.load_text(run.info.artifact_uri + "/report.html"))
"""


@contextmanager
def served(folder: Path, secrets: Path, settings: dict[str, str]) -> Iterator[str]:
    """The server's address, once it is healthy."""
    port, log = free_port(), folder / "log"
    given = {f"{name}_FILE": str(secrets / file) for name, file in FILES.items()}
    given |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(folder), "HOME": str(folder)}
    given |= {"PORT": str(port), "WORKERS": "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | settings
    command = ["bash", str(MLFLOW / "serve.sh")]
    with log.open("w") as out:
        server = subprocess.Popen(command, env=given, stdout=out, stderr=out, cwd=folder, start_new_session=True)
    try:
        until = time.monotonic() + 240
        while status(f"http://127.0.0.1:{port}/health") != 200:
            assert server.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


@pytest.mark.slow
def test_records_go_to_postgresql_and_artifacts_to_s3_behind_logins(tmp_path: Path, s3: Callable[[str], Any]) -> None:
    del s3  # for the object store that it has started, and named in the environment
    secrets, storage = tmp_path / "secrets", os.environ["AWS_ENDPOINT_URL"]
    assert run("bash", str(MLFLOW / "secrets.sh"), str(secrets)).returncode == 0
    password = (secrets / "admin_password").read_text()
    with postgres((secrets / "postgres_password").read_text()) as port:
        settings = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "mlflow", "PGDATABASE": "mlflow"}
        settings |= {"MLFLOW_S3_ENDPOINT_URL": storage, "AWS_DEFAULT_REGION": "us-east-1"}
        settings |= {"ARTIFACTS": "s3://tracked/artifacts", "MLFLOW_SERVER_ALLOWED_HOSTS": "127.0.0.1:*"}
        with served(tmp_path, secrets, settings) as home:
            search = f"{home}/api/2.0/mlflow/experiments/search?max_results=1"
            assert status(search) == 401
            assert status(search, "admin:wrong") == 401
            assert status(search, f"admin:{password}") == 200
            assert status(search, f"admin:{password}", host="evil.example") == 403
            login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
            client = [sys.executable, "-c", LOG, home]
            done = subprocess.run(client, env={"PATH": os.environ["PATH"]} | login, capture_output=True, text=True)
            assert done.stdout.endswith("a report\n"), done.stderr
    kept = boto3.client("s3", endpoint_url=storage).list_objects_v2(Bucket="tracked")["Contents"]
    assert [one["Key"].rpartition("/")[2] for one in kept] == ["report.html"]
    said = (tmp_path / "log").read_text()
    assert not any(path.read_text() in said for path in secrets.iterdir())
