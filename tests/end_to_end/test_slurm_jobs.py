"""``infra/slurm/distill.sbatch`` under a real Slurm, on nodes with networks, names and scratch folders of their own."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Slurm, missing
from test_interruptions import slow_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# In place of `distill`: tells what it finds, waits for as many others as it is told to, and ends as it is told to.
PROBE = """#!{python}
import json, os, subprocess, sys, time
from pathlib import Path
import ray

@ray.remote(num_cpus=0.1)
def open_files():
    import resource
    return resource.getrlimit(resource.RLIMIT_NOFILE)

ray.init(logging_level="ERROR", log_to_driver=False)
stranger = {{**os.environ, "RAY_AUTH_TOKEN": "0" * 64}}
refused = subprocess.run([sys.executable, "-c", "import ray; ray.init()"], env=stranger, capture_output=True).returncode
found = {{
    "arguments": sys.argv[1:],
    "nodes": sorted(node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]),
    "resources": ray.cluster_resources(),
    "stranger_refused": refused != 0,
    "open_files": ray.get(open_files.remote()),
}}
Path(f"found-{{os.environ['SLURM_JOB_ID']}}.json").write_text(json.dumps(found))
while len(list(Path().glob("found-*.json"))) < int(os.environ.get("PROBE_WAITS_FOR", "1")) or Path("wait").exists():
    time.sleep(0.2)
sys.exit(int(os.environ.get("PROBE_EXITS", "0")))
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := missing():
        pytest.skip(reason)
    # Not pytest's folder: sockets lie in it, whose paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    with Slurm(folder) as running:
        yield running
    shutil.rmtree(folder)


def program(folder: Path, name: str, text: str) -> str:
    """A program in ``folder/bin``; the search path on which it comes first."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return f"{path.parent}:{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture
def probe(tmp_path: Path) -> str:
    (tmp_path / "job.yaml").touch()
    return program(tmp_path, "distill", PROBE)


def found(folder: Path, job: str) -> Path:
    return folder / f"found-{job}.json"


def test_ray_spans_the_allocation_and_the_exit_code_is_the_jobs(slurm: Slurm, tmp_path: Path, probe: str) -> None:
    (tmp_path / "wait").touch()
    options = ["--nodes=2", "--cpus-per-task=2", "--gpus-per-node=1", "--mem=2000"]
    job = slurm.submit(tmp_path, *options, PATH=probe, PROBE_EXITS="7")
    slurm.wait(found(tmp_path, job).exists, "probe's finding", 120)

    tokens = list(slurm.folder.glob("n*/scratch/distill-*/token"))
    assert len(tokens) == 2 and len({path.read_text() for path in tokens}) == 1
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tokens)
    assert all(path.parent.stat().st_mode & 0o777 == 0o700 for path in tokens)
    token = tokens[0].read_text()
    assert len(token) == 64 and not any(token in line for line in slurm.processes())
    assert token not in (slurm.folder / "controller.log").read_text()
    (tmp_path / "wait").unlink()

    facts = slurm.end(job)
    log = (tmp_path / f"{job}.log").read_text()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "7:0", "0"), log
    told = json.loads(found(tmp_path, job).read_text())
    assert told["arguments"] == ["run", "job.yaml"] and told["nodes"] == ["n1", "n2"] and told["stranger_refused"]
    assert (told["resources"]["CPU"], told["resources"]["GPU"]) == (4, 2)
    assert told["resources"]["object_store_memory"] == 2 * 600 * 2**20
    assert told["open_files"][0] == min(told["open_files"][1], 65536)
    assert slurm.leftovers() == [], log
    assert "Ray ended" not in log


def test_two_jobs_share_a_node(slurm: Slurm, tmp_path: Path, probe: str) -> None:
    options = ["--nodelist=n1", "--cpus-per-task=2", "--mem=2000"]
    jobs = [slurm.submit(tmp_path, *options, PATH=probe, PROBE_WAITS_FOR="2") for _ in range(2)]
    for job in jobs:
        assert slurm.end(job)["JobState"] == "COMPLETED", (tmp_path / f"{job}.log").read_text()
        told = json.loads(found(tmp_path, job).read_text())
        assert told["nodes"] == ["n1"] and told["resources"]["CPU"] == 2
    assert slurm.leftovers() == []


def test_a_node_that_does_not_join_is_told_of(slurm: Slurm, tmp_path: Path, probe: str) -> None:
    real = Path(sys.executable).parent / "ray"
    program(tmp_path, "ray", f'#!/bin/sh\n[ "$(hostname)" = n1 ] || exec sleep 600\nexec {real} "$@"\n')
    options = ["--nodes=2", "--cpus-per-task=2", "--mem=2000"]
    job = slurm.submit(tmp_path, *options, PATH=probe, DISTILL_JOIN_SECONDS="60")
    facts = slurm.end(job)
    log = (tmp_path / f"{job}.log").read_text()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "1:0"), log
    assert "of 2 nodes only n1 joined Ray within 60 s" in log and "Traceback" not in log
    assert not found(tmp_path, job).exists() and slurm.leftovers() == []


def test_a_head_that_does_not_start_is_told_of(slurm: Slurm, tmp_path: Path, probe: str) -> None:
    program(tmp_path, "ray", "#!/bin/sh\necho no room for Ray\nexit 3\n")
    job = slurm.submit(tmp_path, "--cpus-per-task=2", PATH=probe)
    facts = slurm.end(job, 60)
    log = (tmp_path / f"{job}.log").read_text()
    assert facts["JobState"] == "FAILED" and "no room for Ray" in log and "Ray didn't start on n1" in log, log
    assert slurm.leftovers() == []


def committed(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "run/store/parts").glob("*.json")}


def submit_slow(slurm: Slurm, digits: Path, folder: Path, *options: str) -> str:
    """A job that has committed a part of its store, and has most of it before it."""
    slow_job(digits, folder)
    job = slurm.submit(folder, "--cpus-per-task=2", "--mem=3000", *options)
    slurm.wait(lambda: committed(folder), "committed part", 400, folder / f"{job}.log")
    return job


def test_a_preempted_job_goes_on_by_itself(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    job = submit_slow(slurm, digits, tmp_path, "--nodes=2")
    slurm.call("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    slurm.wait(lambda: slurm.facts(job)["JobState"] == "PENDING", "return to the queue", 60)
    log = (tmp_path / f"{job}.log").read_text()
    assert "the same command goes on from there" in log and "queued again" in log and "Traceback" not in log, log
    slurm.wait(lambda: not slurm.leftovers(), "quiet nodes")
    kept = committed(tmp_path)
    assert kept and not (tmp_path / "run/store/manifest.json").exists()

    # Slurm itself would wait for two minutes.
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")
    facts = slurm.end(job, 600)
    log = (tmp_path / f"{job}.log").read_text()
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    assert json.loads((tmp_path / "run/store/stage.json").read_text())["made"]["parts_kept"] >= len(kept)
    assert committed(tmp_path).items() >= kept.items()
    distill = Path(sys.executable).with_name("distill")
    subprocess.run([distill, "store", "verify", tmp_path / "run/store"], check=True, capture_output=True)
    assert slurm.leftovers() == []


def test_a_cancelled_job_stays_cancelled(slurm: Slurm, digits: Path, tmp_path: Path) -> None:
    job = submit_slow(slurm, digits, tmp_path, "--nodes=2")
    slurm.call("scancel", job)
    facts = slurm.end(job, 60)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    slurm.wait(lambda: not slurm.leftovers(), "quiet node")
    log = (tmp_path / f"{job}.log").read_text()
    assert "queued again" not in log and not (tmp_path / "run/store/manifest.json").exists()
    time.sleep(2)
    assert slurm.facts(job)["JobState"] == "CANCELLED"
