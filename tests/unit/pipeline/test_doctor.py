"""``distill doctor`` as it is called: what a spec reads, exit codes, JSON; and a real Ray that has too little."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_head import ray_head

from cluster.checkup import services
from cluster.files import Folder
from cluster.jobs import Jobs
from distill_jobs.doctor import reads
from distill_jobs.spec import parse_job
from distill_jobs.stage import StageRecord

ROOT = Path(__file__).parents[3]


def spec(folder: Path, **changes: Any) -> dict[str, Any]:
    train = {"epochs": 1, "batch_size": 8, "learning_rate": 0.1}
    return {
        "name": "small",
        "task": "classification",
        "workdir": str(folder / "run"),
        "data": {"train": str(folder / "rows*.csv"), "label": "y", "features": {"tabular": {"numeric": ["x"]}}},
        "teacher": {"model": {"mlp": {"hidden": [8]}}, "train": train},
        "student": {"model": {"mlp": {"hidden": [4]}}, "train": train},
        **changes,
    }


def test_what_a_spec_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [missing] = reads(parse_job(spec(tmp_path)))
    assert (missing.check, missing.level) == ("data.train", "problem") and "rows*.csv is not there" in missing.text
    (tmp_path / "rows-1.csv").write_text("x,y\n1,0\n")
    assert [each.level for each in reads(parse_job(spec(tmp_path)))] == ["ok"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = spec(tmp_path, teacher={"model": {"hf": "nobody/no-such-model"}})
    [found] = reads(parse_job(hub))
    assert (found.check, found.level) == ("teacher.model.hf", "problem") and "HF_HUB_OFFLINE" in found.remedy
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert [each.level for each in reads(parse_job(hub))] == ["warning"]


def doctor(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return call(folder, "doctor", *arguments, **environment)


def call(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill_jobs", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, check=False)


def test_exit_codes_and_json_where_torch_and_ray_are_broken(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for name in ("torch", "ray"):
        (tmp_path / "broken" / f"{name}.py").write_text("raise ImportError('broken on purpose')")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec(tmp_path)))
    secret = {"AWS_SECRET_ACCESS_KEY": "do-not-print", "MLFLOW_TRACKING_PASSWORD": "do-not-print"}
    done = doctor(tmp_path, "job.yaml", "--json", PYTHONPATH=f"{tmp_path / 'broken'}:{ROOT}", **secret)
    assert done.returncode == 2 and not done.stderr, done.stderr
    found = {each["check"]: each for each in json.loads(done.stdout)}
    assert all("broken on purpose" in found[name]["text"] for name in ("torch", "Ray"))
    assert found["data.train"]["level"] == "problem" and found["packages"]["level"] == "ok"
    assert "do-not-print" not in done.stdout


@pytest.mark.slow
def test_a_real_ray_with_too_little_room(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("x,y\n1,0\n")
    job = spec(tmp_path, cluster={"cpus": 2})
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    well = doctor(tmp_path, "job.yaml")
    assert well.returncode == 0 and "there is room for all that the spec holds" in well.stdout, well.stdout
    bad = doctor(tmp_path, "job.yaml", "--set", "data.actors=64")
    assert bad.returncode == 2 and "data.actors asks for 64 workers of 1 CPU" in bad.stdout, bad.stdout


@pytest.mark.slow
def test_what_a_node_lacks_is_told() -> None:
    from cluster.session import Session

    with Session(cpus=1):
        import ray

        address = ray.get_runtime_context().gcs_address
        found = list(services.ray_cluster(address, None, None, {}, ["numpy<1"], "3.11"))
    assert [each.level for each in found] == ["ok", "problem"]
    assert "numpy is" in found[1].text and found[1].remedy == "install it from the lock"


@pytest.mark.slow
def test_a_dashboard_with_a_token_and_the_status_of_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "a-token-of-the-tests-0123456789abcdef"
    (tmp_path / "rows.csv").write_text("x,y\n1,0\n")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(spec(tmp_path)))
    StageRecord("prepare", "d", {}, {}, {"wall_seconds": 2.5}, 1.0, 3.5).commit(Folder(str(tmp_path / "run/data")))
    (tmp_path / "empty").mkdir()
    with ray_head(cpus=2, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token) as head:
        asked = ("doctor", "job.yaml", "--address", head.dashboard)
        well = call(tmp_path, *asked, RAY_AUTH_TOKEN=token)
        assert well.returncode == 0 and "1 node, 2 CPU" in well.stdout and "there is room" in well.stdout, well.stdout
        short = call(tmp_path, *asked, "--set", "data.actors=64", RAY_AUTH_TOKEN=token)
        assert short.returncode == 0 and "warning  resources: data.actors asks for 64 workers" in short.stdout
        refused = call(tmp_path, *asked, RAY_AUTH_TOKEN=token[::-1])
        assert refused.returncode == 2 and "problem  dashboard:" in refused.stdout and token not in refused.stdout

        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
        jobs = Jobs(head.dashboard)
        named = {"distill.workdir": str(tmp_path / "run")}
        jobs.submit("true", tmp_path / "empty", job_id="small-1", metadata=named, env={})
        jobs.submit("true", tmp_path / "empty", job_id="other-1", metadata={}, env={})
        told = call(tmp_path, "status", "small-1", "--address", head.dashboard)
        assert told.returncode == 0 and "no command is known to run; still to do: teacher" in told.stdout, told.stderr
        other = call(tmp_path, "status", "other-1", "--address", head.dashboard)
        assert other.returncode == 2 and "other-1 is no pipeline" in other.stderr
