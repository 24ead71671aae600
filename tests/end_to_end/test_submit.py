"""Jobs on a real Ray cluster with a dashboard and a token: submitted, refused, stopped, killed, submitted again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import yaml
from conftest import digits_spec, write_spec
from ray_head import Head, ray_head
from test_interruptions import SLOW_TEACHER

from cluster.errors import JobError
from cluster.files import Folder
from cluster.jobs import Jobs

TOKEN = "a-token-of-the-tests-0123456789abcdef"
Done = subprocess.CompletedProcess[str]
Ask = Callable[..., Done]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(cpus=2, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as running:
        yield running


@pytest.fixture
def ask(head: Head, tmp_path: Path) -> Ask:
    """Runs ``distill`` beside the cluster, as somebody who knows its token."""

    def call(*arguments: str | Path, address: bool = True, **env: str) -> Done:
        where = ["--address", head.dashboard] if address else []
        return subprocess.run(
            [sys.executable, "-m", "distill_jobs", *map(str, arguments), *where],
            capture_output=True,
            text=True,
            timeout=400,
            cwd=tmp_path,
            env={**clean(), "RAY_AUTH_TOKEN": TOKEN, **env},
            check=False,
        )

    return call


def clean() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    return {**own, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", "HOME": "/nonexistent"}


def job_of(digits: Path, folder: Path, **changes: Any) -> Path:
    """A small job with relative paths, as somebody would write it in ``folder``."""
    spec = digits_spec(digits, Path("runs/digits"), seeds=[0], capture={"actors": 1}, **changes)
    spec["student"]["train"]["workers"] = 1
    return write_spec(folder / "job.yaml", spec)


def slow_job(digits: Path, folder: Path, **changes: Any) -> Path:
    """One whose capture takes minutes as long as there is a file ``brake``, so that it can be caught in the middle."""
    (folder / "brake").touch()
    pause = f"time.sleep(1.5 if pathlib.Path({str(folder / 'brake')!r}).exists() else 0.0)"
    (folder / "slow.py").write_text(SLOW_TEACHER.replace("time.sleep(0.3)", pause).replace("time,", "pathlib, time,"))
    teacher = {"model": {"factory": {"target": "slow:make"}}}
    spec = digits_spec(digits, Path("runs/digits"), teacher=teacher, data__rows_per_part=120, seeds=[0], **changes)
    spec["student"]["train"]["workers"] = 1
    return write_spec(folder / "job.yaml", {**spec, "capture": {"actors": 1, "batch_tokens": 32}})


def id_in(printed: str) -> str:
    found = re.search(r"^started (\S+)$", printed, re.M)
    assert found, printed
    return found[1]


def until(true: Callable[[], Any], seconds: float = 240, tell: Callable[[], str] = str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, tell()
        time.sleep(0.2)


def processes_of(job_id: str) -> list[psutil.Process]:
    """The job's own command and its workers."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DISTILL_JOB") == job_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def left_over(job_id: str) -> list[str]:
    """What still works for a job, by what Ray calls it; an idle worker waits for a next task and is nobody's actor."""
    found = []
    for process in processes_of(job_id):
        try:
            name = " ".join(process.cmdline())
        except psutil.Error:
            continue
        found += [name] if name and "IDLE" not in name else []
    return found


def runs_of(folder: Path) -> dict[str, str]:
    """The status of each MLflow run, by its name."""
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'runs/mlflow.db'}")
    experiment = client.get_experiment_by_name("digits")
    return {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}


def test_what_could_not_run_there_is_refused_before_anything_starts(ask: Ask, digits: Path, tmp_path: Path) -> None:
    spec = job_of(digits, tmp_path, data__test="/shared/of/the/cluster/test.parquet", data__actors=7)
    refused = ask("submit", spec, "--set", "teacher.model={hf: s3://no-such-bucket/model}", AWS_ACCESS_KEY_ID="x")
    assert refused.returncode == 2 and "so that nothing was started" in refused.stderr, refused.stdout + refused.stderr
    assert "data.actors asks for 7 workers of 1 CPU (7 in all), but the cluster has 2" in refused.stderr
    assert "data.test: /shared/of/the/cluster/test.parquet is not there" in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout and TOKEN not in refused.stderr + refused.stdout
    assert not (tmp_path / "runs").exists()
    assert "no job was submitted to this cluster" in ask("jobs", "list").stdout


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Sets the token that this process knows, and no other."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return lambda value: monkeypatch.setenv("RAY_AUTH_TOKEN", value)


def test_the_token_is_asked_for(
    head: Head, token: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for wrong in ("", "not-the-right-one"):
        token(wrong)
        with pytest.raises(JobError, match=r"wants Ray's token.*: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"):
            Jobs(head.dashboard).all()
    token("")
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    Jobs(head.dashboard).all()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path))
    with pytest.raises(JobError, match="can't read Ray's token from"):
        Jobs(head.dashboard).all()


def test_mistakes_are_one_sentence(
    head: Head, token: Callable[[str], None], ask: Ask, digits: Path, tmp_path: Path
) -> None:
    token(TOKEN)
    with pytest.raises(JobError, match=r"no Ray dashboard answers at http://127.0.0.1:1 .*: check --address"):
        Jobs("http://127.0.0.1:1").all()
    with pytest.raises(JobError, match="as http://head:8265, not head:6379"):
        Jobs("head:6379")
    jobs = Jobs(head.dashboard)
    for call in (jobs.get, jobs.logs, jobs.stop):
        with pytest.raises(JobError, match=r"no job no-such-job at .*; `distill jobs list` shows"):
            call("no-such-job")
    verb = ask("submit", job_of(digits, tmp_path), "--do", "dance")
    assert verb.returncode == 2 and "--do takes one of run, prepare" in verb.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_with_local_inputs_runs_to_its_end(ask: Ask, digits: Path, tmp_path: Path) -> None:
    spec = job_of(digits, tmp_path)
    done = ask("submit", spec, "--env", "DISTILL_STORAGE_PATIENCE=20")
    assert done.returncode == 0, done.stdout + done.stderr
    job_id = id_in(done.stdout)
    assert f"{job_id} has succeeded" in done.stdout and "Learning from the teacher" in done.stdout
    run = tmp_path / "runs/digits"
    assert (run / "report.html").exists() and len(list((run / "inputs").rglob("digits.parquet"))) == 1
    assert not (run / "lease.json").exists() and not list(run.glob(".*.tmp"))
    told = json.loads(ask("jobs", "status", job_id).stdout)
    assert told["status"] == "SUCCEEDED" and told["distill.workdir"] == str(run)
    assert job_id in ask("jobs", "list").stdout
    assert ask("jobs", "logs", job_id).stdout in done.stdout
    assert "has succeeded already" in ask("jobs", "stop", job_id).stdout
    # The same from another place on this machine: nothing is done twice.
    again = ask("submit", spec)
    assert again.returncode == 0 and "capture      skipped: nothing it depends on has changed" in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_stopped_refused_killed_and_submitted_again(ask: Ask, digits: Path, tmp_path: Path) -> None:
    spec, run = slow_job(digits, tmp_path), tmp_path / "runs/digits"
    parts = run / "store/parts"
    first = id_in(ask("submit", spec, "--no-follow").stdout)
    until(lambda: list(parts.glob("*.json")), tell=lambda: ask("jobs", "logs", first).stdout)

    # A second one in the same workdir: from the cluster, and from this machine.
    second = ask("submit", spec, "--no-follow")
    assert second.returncode == 2 and f"job {first} is at work in {run}" in second.stderr
    here = ask("run", spec, address=False)
    assert here.returncode == 2 and f"by Ray job {first} since" in here.stderr and "Traceback" not in here.stderr

    stopped = ask("jobs", "stop", first)
    assert stopped.returncode == 0 and f"{first} has stopped" in stopped.stdout, stopped.stderr
    assert left_over(first) == []
    assert runs_of(tmp_path)["capture"] == runs_of(tmp_path)["digits"] == "KILLED"
    assert not (run / "lease.json").exists() and not (run / "store/manifest.json").exists()
    kept = {path.name: path.read_bytes() for path in parts.glob("*.json")}

    # Killed outright this time: driver and all, nothing is tidied up.
    third = id_in(ask("submit", spec, "--no-follow").stdout)
    until(lambda: len(list(parts.glob("*.json"))) > len(kept), tell=lambda: ask("jobs", "logs", third).stdout)
    for process in psutil.process_iter(["cmdline"]):
        if (
            "distill_jobs.submitted" in (process.info["cmdline"] or [])
            and str(process.environ().get("DISTILL_JOB")) == third
        ):
            process.send_signal(signal.SIGKILL)
    until(lambda: json.loads(ask("jobs", "status", third).stdout)["status"] == "FAILED")
    until(lambda: not left_over(third), 30, lambda: str(left_over(third)))
    assert (run / "lease.json").exists()
    kept |= {path.name: path.read_bytes() for path in parts.glob("*.json")}

    (tmp_path / "brake").unlink()
    began = time.monotonic()
    last = ask("submit", spec)
    assert last.returncode == 0, last.stdout + last.stderr
    assert "has succeeded" in last.stdout and time.monotonic() - began < 300
    assert all((parts / name).read_bytes() == record for name, record in kept.items())
    assert json.loads((run / "store/stage.json").read_text())["made"]["parts_kept"] >= len(kept)
    assert set(runs_of(tmp_path).values()) == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_terminal_that_is_closed_leaves_the_job_running(ask: Ask, head: Head, digits: Path, tmp_path: Path) -> None:
    spec = job_of(digits, tmp_path)
    terminal = subprocess.Popen(
        [sys.executable, "-m", "distill_jobs", "submit", str(spec), "--address", head.dashboard],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**clean(), "RAY_AUTH_TOKEN": TOKEN},
        start_new_session=True,
    )
    assert terminal.stdout is not None
    printed = ""
    while "prepare " not in printed:
        printed += terminal.stdout.readline()
    os.killpg(terminal.pid, signal.SIGHUP)
    terminal.wait(30)
    followed = ask("jobs", "logs", id_in(printed), "--follow")
    assert followed.returncode == 0 and "has succeeded" in followed.stdout, followed.stdout + followed.stderr
    assert (tmp_path / "runs/digits/report.html").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_on_an_object_store_whose_login_only_the_nodes_know(
    s3: Callable[[str], Folder], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3("jobs")
    store = {name: os.environ[name] for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")}
    login = {"AWS_ACCESS_KEY_ID": "key-of-the-nodes", "AWS_SECRET_ACCESS_KEY": "secret-of-the-nodes"}
    tree = {**yaml.safe_load(job_of(digits, tmp_path).read_text()), "workdir": f"{bucket}/run"}
    spec = write_spec(tmp_path / "job.yaml", tree)
    tracking = ["--set", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]

    def submit(head: Head, *more: str) -> Done:
        command = [sys.executable, "-m", "distill_jobs", "submit", str(spec), "--address", head.dashboard, *more]
        # The submitting machine knows neither the endpoint nor the login.
        env = {name: value for name, value in clean().items() if not name.startswith("AWS_")}
        return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path, env=env, check=False)

    for name in login:
        monkeypatch.delenv(name)
    with ray_head(cpus=2, AWS_EC2_METADATA_DISABLED="true", HOME=str(tmp_path), **store) as head:
        refused = submit(head, *tracking)
        assert refused.returncode == 2 and f"workdir {bucket}/run, where the job would run: " in refused.stderr
        assert (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY not set" in refused.stderr
            and "Traceback" not in refused.stderr
        )
    with ray_head(cpus=2, AWS_EC2_METADATA_DISABLED="true", **store, **login) as head:
        refused = submit(head)
        assert refused.returncode == 2 and "give tracking.uri" in refused.stderr, refused.stderr
        done = submit(head, *tracking)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not [value for value in login.values() if value in done.stdout + done.stderr]
    for name, value in login.items():
        monkeypatch.setenv(name, value)
    run = bucket / "run"
    assert run.exists("report.html") and run.exists("store/manifest.json") and not run.exists("lease.json")
