"""Captures whose actors and drivers are really killed, at every moment of a commit: nothing lost, nothing twice."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from capture_faults import MOMENTS, PACE, content, make_job, make_ready, plan_faults, run_capture

from cluster.errors import FileError, ShardError
from cluster.files import Folder
from cluster.session import Session
from distill_jobs.spec import Job
from distill_jobs.store.verify import verify

SOAK_SECONDS = float(os.environ.get("DISTILL_SOAK_SECONDS", "240"))


@pytest.fixture(scope="module")
def undisturbed(session: Session, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What every part must hold in the end."""
    job = make_job(tmp_path_factory.mktemp("undisturbed"), actors=2)
    make_ready(job, session)
    made = run_capture(job, session)
    assert made["parts"] == 10 and made["quarantined"] == 0
    assert made["capture"]["lost_actors"] == made["capture"]["retried"] == 0
    return content(Path(job.workdir) / "store")


def whole(job: Job, expected: list[str]) -> None:
    """The store is proven complete, holds what it should, and no attempt has left anything behind."""
    store = Path(job.workdir) / "store"
    assert verify(Folder(str(store)), Folder(job.workdir) / "data") == []
    assert content(store) == expected
    names = sorted(os.listdir(store / "parts"))
    assert sum(name.endswith(".arrow") for name in names) == len(expected)
    assert all(re.fullmatch(r"part-\d+(\.\w+\.arrow|\.json)|manifest\.json", name) for name in names), names


@pytest.mark.timeout(200)
def test_actors_killed_at_every_moment_of_a_commit(session: Session, tmp_path: Path, undisturbed: list[str]) -> None:
    job = make_job(tmp_path, actors=2, retries=1)
    make_ready(job, session)
    plan_faults(tmp_path / "run/faults", {1 + 2 * i: moment for i, moment in enumerate(MOMENTS)})
    made = run_capture(job, session)
    assert made["capture"]["lost_actors"] == made["capture"]["retried"] == len(MOMENTS)
    assert not os.listdir(tmp_path / "run/faults")
    whole(job, undisturbed)


@pytest.mark.slow
def test_an_actor_told_to_go_costs_no_retry(session: Session, tmp_path: Path, undisturbed: list[str]) -> None:
    job = make_job(tmp_path, actors=2, retries=0)
    make_ready(job, session)
    plan_faults(tmp_path / "run/faults", {3: "leave", 6: "leave"})
    made = run_capture(job, session)
    assert made["capture"]["retried"] == 0
    assert not os.listdir(tmp_path / "run/faults")
    whole(job, undisturbed)


@pytest.mark.slow
def test_storage_that_fails_for_a_moment_is_asked_again(
    session: Session, tmp_path: Path, undisturbed: list[str]
) -> None:
    job = make_job(tmp_path, actors=2, retries=1)
    make_ready(job, session)
    plan_faults(tmp_path / "run/faults", {2: "flaky", 5: "flaky"})
    assert run_capture(job, session)["capture"]["retried"] == 2
    whole(job, undisturbed)


@pytest.mark.slow
def test_a_full_disk_ends_it_at_once_and_keeps_what_is_committed(
    session: Session, tmp_path: Path, undisturbed: list[str]
) -> None:
    job = make_job(tmp_path, actors=1, retries=3)
    make_ready(job, session)
    plan_faults(tmp_path / "run/faults", {4: "full"})
    with pytest.raises(FileError, match="no space left on device; free some space and run the same command again"):
        run_capture(job, session)
    kept = {p.name: p.read_bytes() for p in (tmp_path / "run/store/parts").glob("*.json")}
    assert len(kept) == 4 and not (tmp_path / "run/store/manifest.json").exists()
    assert run_capture(job, session)["parts_kept"] == 4
    assert all((tmp_path / "run/store/parts" / name).read_bytes() == record for name, record in kept.items())
    whole(job, undisturbed)


@pytest.mark.slow
def test_a_part_that_kills_every_actor_is_named(session: Session, tmp_path: Path, undisturbed: list[str]) -> None:
    job = make_job(tmp_path, actors=1, retries=1)
    make_ready(job, session)
    plan_faults(tmp_path / "run/faults", {2: "begun"})
    plan_faults(tmp_path / "run/faults", {2: "before"})
    with pytest.raises(ShardError, match="capture: shard 2 failed 2 times, the last time because its actor died"):
        run_capture(job, session)
    assert run_capture(job, session)["parts_kept"] >= 2
    whole(job, undisturbed)


def drive(folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Capture in a process of its own, with a Ray cluster of its own."""
    code = Path(__file__).with_name("capture_faults.py")
    return subprocess.Popen([sys.executable, str(code), str(folder)], env={**os.environ, **environment})


@pytest.mark.timeout(200)
def test_a_driver_killed_before_the_manifest(session: Session, tmp_path: Path, undisturbed: list[str]) -> None:
    job = make_job(tmp_path, actors=2)
    make_ready(job, session)
    (tmp_path / "run/faults").mkdir()
    (tmp_path / "run/faults/driver.manifest").touch()
    assert drive(tmp_path).wait(120) == -signal.SIGKILL
    assert len(list((tmp_path / "run/store/parts").glob("*.json"))) == 10
    [problem] = verify(Folder(str(tmp_path / "run/store")))
    assert "is not complete" in problem
    made = run_capture(job, session)
    assert made["parts_kept"] == 10 and made["capture"]["retried"] == 0
    whole(job, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_long_soak_of_random_kills(session: Session, tmp_path: Path) -> None:
    """For minutes, whatever belongs to a capture is killed: actors, raylets, control stores, drivers."""
    chance = random.Random(0)
    calm, job = (make_job(tmp_path / name, rows=9000, per_part=15, actors=2, retries=50) for name in ("calm", "soak"))
    for one in (calm, job):
        make_ready(one, session)
    run_capture(calm, session)
    struck: Counter[str] = Counter()
    end = time.monotonic() + SOAK_SECONDS
    while time.monotonic() < end and not (tmp_path / "soak/run/store/manifest.json").exists():
        running = drive(tmp_path / "soak", **{PACE: "0.5"})
        while running.poll() is None and time.monotonic() < end:
            time.sleep(chance.uniform(1, 8))
            struck[strike(running.pid, chance)] += 1
        running.kill()
        running.wait(60)
    before = len(list((tmp_path / "soak/run/store/parts").glob("*.json")))
    made = run_capture(job, session)
    print(f"\nkilled {dict(struck)}; at the last start {made['parts_kept']} of {made['parts']} parts were there")
    assert made["parts_kept"] == before and struck["actor"] and struck.total() - struck["nobody"] > 5
    whole(job, content(tmp_path / "calm/run/store"))


def strike(driver: int, chance: random.Random) -> str:
    """Kill one process of a driver's at random: mostly actors; what it was."""
    try:
        family = psutil.Process(driver).children(recursive=True)
        found = {"actor": [p for p in family if "ray::" in " ".join(p.cmdline())]}
        found |= {name: [p for p in family if p.name().startswith(name)] for name in ("raylet", "gcs_server")}
        found["driver"] = [psutil.Process(driver)]
        [what] = chance.choices(list(found), weights=[20, 1, 1, 2])
        if not found[what]:
            return "nobody"
        chance.choice(found[what]).kill()
    except psutil.NoSuchProcess:
        return "nobody"
    return what
