"""A job on a cluster: packed, looked at, started, followed. What runs there is ``distill_jobs/submitted.py``."""

import hashlib
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

import cluster
import distill_jobs
from cluster import preflight
from cluster.errors import JobError, LeaseError
from cluster.files import Folder
from cluster.jobs import Job as RayJob
from cluster.jobs import Jobs
from cluster.lease import Lease, refusal
from cluster.logged import is_secret
from distill_jobs import shipping
from distill_jobs.console import Console
from distill_jobs.errors import SpecError, SubmitError
from distill_jobs.needs import needs_of
from distill_jobs.shipping import DEAD_LEASE, JOB
from distill_jobs.spec import Job

SPEC = "spec.yaml"
NAME, WORKDIR, VERB = "distill.name", "distill.workdir", "distill.verb"
VERBS = ("run", "prepare", "teach", "capture", "train", "tune", "evaluate", "audit", "report")
_LOOK = "look"


@dataclass(frozen=True)
class Options:
    """How a job is submitted.

    Attributes:
        verb: what the job does.
        check: look at the cluster first.
        ship_code: have this machine's code travel with the job; else the nodes' own is used.
        env: environment variables for the job and its workers; no secrets.
        cpus, resources: what the command itself holds beside its workers; nothing, unless it is to leave the head.
    """

    verb: str = "run"
    check: bool = True
    ship_code: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    cpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)


def submit(job: Job, jobs: Jobs, options: Options, console: Console) -> str:
    """Start the job on the cluster, and return its id.

    Raises:
        SubmitError: it could not run there, with all reasons.
        LeaseError: another job is at work, or waits for its turn, in the same workdir.
        JobError: the cluster can't be reached, or refuses.
    """
    _refuse_second(job, jobs)
    with tempfile.TemporaryDirectory(prefix="distill-") as made:
        folder = Path(made)
        tree = _pack(job, folder)
        dead = _look(job, tree, jobs, options, console, folder) if options.check else ""
        return _start(job, jobs, options, folder, dead)


def follow(job_id: str, jobs: Jobs, console: Console) -> RayJob:
    """Show what a job prints until it is over, and say how it ended."""
    found = jobs.follow(job_id, console.pass_on)
    took = f" after {found.ended - found.started:.0f} s" if found.started and found.ended else ""
    console.say(f"{job_id} has {'succeeded' if found.status == 'SUCCEEDED' else found.status.lower()}{took}")
    if found.status == "FAILED" and found.exit_code is None:
        console.say(f"  {found.message}")
    return found


def exit_code(job: RayJob) -> int:
    """What a command that followed a job to its end exits with: what the job's own command did."""
    return {"SUCCEEDED": 0, "STOPPED": 130}.get(job.status, job.exit_code or 1)


def parse_env(given: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE``, or ``NAME`` for the value that it has here, as a mapping.

    Raises:
        SpecError: a name is not set here, or is a secret's.
    """
    found = {}
    for each in given:
        name, equals, value = each.partition("=")
        if is_secret(name):
            raise SpecError(
                f"--env {name}: a job's environment can be read by all who see the dashboard, so no secret travels in "
                "it; have it in the environment of the cluster's nodes (a Kubernetes secret, for example)"
            )
        if not equals and name not in os.environ:
            raise SpecError(f"--env {name}: it is not set here; set it, or give --env {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def _refuse_second(job: Job, jobs: Jobs) -> None:
    for other in jobs.all():
        if not other.over and other.metadata.get(WORKDIR) == job.workdir:
            state = "waits to start" if other.waiting else "is at work"
            raise LeaseError(
                f"job {other.id} {state} in {job.workdir}: wait for it, end it (`distill jobs stop {other.id}`), or "
                "give another workdir"
            )


def _pack(job: Job, folder: Path) -> dict[str, Any]:
    """What travels with the job, in ``folder``; returns the spec's tree as the job will read it."""
    tree = job.model_dump(mode="json", exclude_none=True)
    # The job joins the cluster that it runs on.
    tree.pop("cluster", None)
    shipping.pack(tree, job.workdir, folder)
    for path in shipping.code_of(tree, Path.cwd()):
        shipping.copy(path, folder)
    (folder / SPEC).write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return tree


def _look(job: Job, tree: dict[str, Any], jobs: Jobs, options: Options, console: Console, folder: Path) -> str:
    """Ask the cluster whether the job could run there; returns the token of a lease that a dead job has left."""
    console.say(f"looking at the cluster at {jobs.address}")
    read: dict[str, list[str]] = {}
    travelled = f"{job.workdir.rstrip('/')}/{shipping.INPUTS}/"
    for setting, place in shipping.places(tree):
        if ("://" in place or place.startswith("/")) and not place.startswith(travelled):
            read.setdefault(setting, []).append(place)
    with _probe(job.workdir) as probe:
        request = preflight.Request(
            job.workdir,
            probe,
            read,
            needs_of(job),
            _requirements(),
            f"{sys.version_info[0]}.{sys.version_info[1]}",
            job.tracking.uri,
            job.tracking.experiment or job.name,
        )
        preflight.write(request, Folder(str(folder)))
        looking = jobs.submit(
            "exec python -m cluster.preflight",
            folder,
            job_id=_new_id(f"{_LOOK}-{job.name}"),
            metadata={NAME: job.name, VERB: _LOOK},
            env=options.env,
            modules=_modules(),
            cpus=options.cpus,
            resources=options.resources,
        )
        found = jobs.wait(looking)
    (folder / preflight.REQUEST).unlink()
    printed = jobs.logs(looking)
    answer = preflight.answer_in(printed)
    if answer is None:
        last = printed.strip().splitlines()[-1:] or [found.message]
        raise SubmitError(f"a look at the cluster failed, so that nothing was started: {last[0].strip()}")
    for note in answer.notes:
        console.say(f"note: {note}; it waits until the cluster has grown")
    if answer.problems:
        told = "\n  ".join(answer.problems)
        raise SubmitError(f"the job could not run there, so that nothing was started:\n  {told}")
    have = ", ".join(f"{answer.resources[unit]:g} {unit}" for unit in ("CPU", "GPU") if answer.resources.get(unit))
    nodes = "1 node" if answer.nodes == 1 else f"{answer.nodes} nodes"
    console.say(f"{nodes} with {have or 'no CPU yet'}: the job can run")
    return _gone(answer.lease, job, jobs) if answer.lease else ""


def _gone(lease: Lease, job: Job, jobs: Jobs) -> str:
    """The token of a lease whose owner is over; one that may still live is a refusal."""
    if lease.job:
        try:
            if jobs.get(lease.job).over:
                return lease.token
        except JobError:  # a job of another cluster
            pass
    raise LeaseError(refusal(Folder(job.workdir), lease))


def _start(job: Job, jobs: Jobs, options: Options, folder: Path, dead: str) -> str:
    job_id = _new_id(job.name)
    own = {JOB: job_id, **({DEAD_LEASE: dead} if dead else {}), "COLUMNS": os.environ.get("COLUMNS", "100")}
    return jobs.submit(
        f"exec python -m distill_jobs.submitted {options.verb}",
        folder,
        job_id=job_id,
        metadata={
            NAME: job.name,
            WORKDIR: job.workdir,
            VERB: options.verb,
            "distill.version": distill_jobs.__version__,
            "distill.code": _code_digest() if options.ship_code else "of the nodes",
        },
        env={**own, **options.env},
        modules=_modules() if options.ship_code else (),
        cpus=options.cpus,
        resources=options.resources,
    )


@contextmanager
def _probe(workdir: str) -> Iterator[str | None]:
    """A file in the workdir for the nodes to look for, where the workdir lies on this machine or a share of it.

    One that this machine has no place for is taken for a folder of the cluster's.
    """
    folder = Folder(workdir)
    if not folder.is_local or not (folder.path().parent.is_dir() or folder.path().is_relative_to(Path.cwd())):
        yield None
        return
    name = f".{uuid.uuid4().hex}.tmp"
    made = [path for path in (folder.path(), *folder.path().parents) if not path.exists()]
    folder.write(name, b"")
    try:
        yield name
    finally:
        folder.remove(name)
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def _modules() -> list[Path]:
    return [Path(str(package.__path__[0])) for package in (cluster, distill_jobs)]


def _code_digest() -> str:
    """What tells one state of the code that travels from another."""
    found = hashlib.sha256()
    for module in _modules():
        for path in sorted(path for path in module.rglob("*") if path.is_file() and path.parent.name != "__pycache__"):
            found.update(str(path.relative_to(module.parent)).encode() + b"\n" + path.read_bytes())
    return found.hexdigest()[:12]


def _requirements() -> list[str]:
    """What the installed package says it needs; those of an extra are for development."""
    return [each for each in metadata.requires("distill-jobs") or () if "extra ==" not in each]


def _new_id(name: str) -> str:
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"


def described(job: RayJob) -> str:
    """What is known of a job, for a script."""
    return json.dumps(
        {
            "id": job.id,
            "status": job.status,
            "message": job.message,
            "started": job.started,
            "ended": job.ended,
            "exit_code": job.exit_code,
            **job.metadata,
        },
        indent=1,
    )
