"""Captures whose actors and drivers are really killed, at every moment of a commit: nothing lost, nothing twice."""

import os
import re
import signal
from pathlib import Path

import pytest
import ray
from capture_faults import MOMENTS, content, make_job, make_ready, plan_faults, run_capture
from soak import Soak, drive

from cluster.errors import FileError, ShardError
from cluster.files import Folder
from cluster.session import Session
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import CaptureError
from distill_jobs.spec import Job
from distill_jobs.store.verify import verify

SOAK_SECONDS = float(os.environ.get("DISTILL_SOAK_SECONDS", "240"))


@pytest.fixture(scope="module")
def undisturbed(session: Session, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What every part must hold in the end."""
    job = make_job(tmp_path_factory.mktemp("undisturbed"), actors=1)
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
def test_more_rows_than_may_be_quarantined_end_it_and_a_higher_limit_goes_on(session: Session, tmp_path: Path) -> None:
    job = make_job(tmp_path, far_off=30, actors=2, max_quarantined=0.01)
    total = DataFacts.load(make_ready(job, session, overflows=True) / "data").splits["train"]["rows"]
    told = (
        rf"the teacher can't score \d of the {total} rows, more than the 5 that capture.max_quarantined allows; "
        r".*rows.parquet.*logits are not finite.*Look at .*/store/quarantine, mend the data or raise "
        r"capture.max_quarantined, and run the same command again; what was committed is kept"
    )
    with pytest.raises(CaptureError, match=told) as ended:
        run_capture(job, session)
    assert ended.value.exit_code == 1 and "\n" not in str(ended.value)
    parts, begun = tmp_path / "run/store/parts", (tmp_path / "run/attempts").read_text()
    kept = {p.name: p.read_bytes() for p in parts.glob("part-*.json")}
    assert 0 < len(kept) < 10 and not (parts / "manifest.json").exists()
    with pytest.raises(CaptureError, match=r"more than the 3 that capture.max_quarantined allows"):
        run_capture(allowing(job, 3), session)
    assert (tmp_path / "run/attempts").read_text() == begun, "nothing is begun that can't count"
    made = run_capture(allowing(job, 0.05), session)
    # An actor may end the part that it is at before it hears that all is over.
    assert len(kept) <= made["parts_kept"] < 10 and made["rows"] + made["quarantined"] == total
    assert 5 < made["quarantined"] <= 0.05 * total
    assert all((parts / name).read_bytes() == record for name, record in kept.items())
    assert verify(Folder(str(tmp_path / "run/store")), Folder(job.workdir) / "data") == []


def allowing(job: Job, most: float) -> Job:
    """The same with another limit; one actor is there sooner than two."""
    return job.model_copy(update={"capture": job.capture.model_copy(update={"max_quarantined": most, "actors": 1})})


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


@pytest.mark.timeout(200)
def test_a_driver_killed_before_the_manifest(session: Session, tmp_path: Path, undisturbed: list[str]) -> None:
    job = make_job(tmp_path, actors=1)
    make_ready(job, session)
    (tmp_path / "run/faults").mkdir()
    (tmp_path / "run/faults/driver.manifest").touch()
    # It joins the session's cluster, which is quicker than one of its own.
    address = ray.get_runtime_context().gcs_address
    assert drive(tmp_path, RAY_ADDRESS=address).wait(120) == -signal.SIGKILL
    assert len(list((tmp_path / "run/store/parts").glob("*.json"))) == 10
    [problem] = verify(Folder(str(tmp_path / "run/store")))
    assert "is not complete" in problem
    made = run_capture(job, session)
    assert made["parts_kept"] == 10 and made["capture"]["retried"] == 0
    whole(job, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_long_soak_of_random_kills(session: Session, tmp_path: Path) -> None:
    """For minutes, whatever belongs to a capture is killed: actors, agents, raylets, control stores, drivers."""
    calm, job = (make_job(tmp_path / name, rows=6000, per_part=15, actors=2, retries=50) for name in ("calm", "soak"))
    for one in (calm, job):
        make_ready(one, session)
    parts = run_capture(calm, session)["parts"]
    soak = Soak(tmp_path / "soak", parts, actors=2, seed=0)
    soak.run(SOAK_SECONDS)
    before = soak.committed()
    made = run_capture(job, session)
    print(
        f"\n{soak.drivers} drivers, killed {dict(soak.struck)}, {soak.awaited} times after a part was committed since "
        f"the kill before; at the last start {made['parts_kept']} of {parts} parts were there; {soak.redone()} shards "
        f"were begun again, at most {soak.in_flight()} were in flight when something was killed"
    )
    # More than before: an actor may end its part after its driver's death.
    assert soak.awaited <= before <= made["parts_kept"] < parts
    assert soak.redone() <= soak.in_flight() + made["capture"]["duplicated"]
    whole(job, content(tmp_path / "calm/run/store"))
