"""What a job would do and take, before it is run: the resolved spec, the stages and why, and a probe's estimate."""

import tempfile
from typing import Any

import yaml

from cluster.files import Folder, digest
from cluster.meter import Usage
from cluster.session import Session
from cluster.shards import map_shards
from distill_jobs.capture.crews import crew_of
from distill_jobs.console import Console
from distill_jobs.context import require_all
from distill_jobs.costs.estimate import Rates, Sizes, StageEstimate, predict, total
from distill_jobs.costs.prices import PriceBook
from distill_jobs.costs.probing import ProbeWorker
from distill_jobs.errors import DistillError
from distill_jobs.inputs import STAGES, Inputs, inputs_of, statuses_of
from distill_jobs.spec import Job
from distill_jobs.words import duration, money, size

PROBE = "probe.json"


def print_plan(job: Job, console: Console) -> None:
    """The whole of ``distill plan``; writes nothing but the probe's result, which a later run uses."""
    console.say(yaml.safe_dump(job.model_dump(mode="json", exclude_none=True), sort_keys=False))
    inputs = inputs_of(job)
    rows = [
        [found.stage, "skip" if found.done else "run", found.reason]
        for stage in STAGES
        for found in statuses_of(job, inputs, stage)
    ]
    console.table("what would run", ["stage", "", "why"], rows)
    with Session(job.cluster.address, job.cluster.cpus, job.cluster.gpus) as session:
        require_all(job, session)
        estimates, _ = estimate(job, inputs, session)
    table = [[e.stage, duration(e.seconds), size(e.bytes), money(e.usd), e.basis] for e in estimates]
    whole = total(estimates)
    table.append([whole.stage, duration(whole.seconds), size(whole.bytes), money(whole.usd), whole.basis])
    console.table("what it would take, done from the start", ["stage", "time", "bytes", "money", "from"], table)


def estimate(job: Job, inputs: Inputs, session: Session) -> tuple[list[StageEstimate], Usage]:
    """Predict every stage from a probe of the real models on real rows, and say what the probe has used.

    A probe is made once for the same inputs; what it found lies in ``probe.json``.
    """
    workdir, usage = Folder(job.workdir), Usage()
    asked = digest([inputs, job.model_dump(mode="json")])
    known = workdir.read_json(PROBE) if workdir.exists(PROBE) else {}
    if known.get("inputs") != asked:
        found, usage = _probe(job, inputs, session)
        known = {"inputs": asked, **found}
        workdir.write_json(PROBE, known)
    sizes, rates = Sizes(**known["sizes"]), Rates(**known["rates"])
    return predict(job, sizes, rates, PriceBook.load(job.costs), session.accelerator()), usage


def _probe(job: Job, inputs: Inputs, session: Session) -> tuple[dict[str, Any], Usage]:
    workdir = Folder(job.workdir)
    found: dict[str, Any] = {}
    prepared = statuses_of(job, inputs, "prepare")[0].done
    taught = prepared and statuses_of(job, inputs, "teach")[0].done

    def on_result(_: Any, result: dict[str, Any]) -> None:
        found.update(result)

    with tempfile.TemporaryDirectory(prefix="probe-") as scratch:
        worker = ProbeWorker(job, workdir / "data" if prepared else None, workdir / "teacher/model" if taught else None)
        crew = crew_of(job.capture.crews[0], lambda: worker, alone=True)
        report = map_shards(session, crew, [scratch], on_result, retries=0, fatal=(DistillError,), what="probe")
    return found, report.usage
