"""The capture stage: a pool of actors takes the parts of the training split and commits the parts of the store."""

from collections.abc import Callable
from typing import Any

from cluster.files import Folder
from cluster.meter import Usage
from cluster.session import Session
from cluster.shards import Crew, map_shards
from distill_jobs.capture.worker import CaptureTask, CaptureWorker
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.errors import DistillError
from distill_jobs.models.files import model_digest, read_serving
from distill_jobs.spec import Job
from distill_jobs.store.codecs import make_codec
from distill_jobs.store.fidelity.measure import FIDELITY, numbers, read
from distill_jobs.store.plan import SPLIT, StorePlan
from distill_jobs.store.writer import finish, start

Progress = Callable[..., None]


def capture(job: Job, session: Session, workdir: Folder, on_progress: Progress) -> tuple[dict[str, Any], Usage]:
    """Capture the training split, and measure what its codec keeps of the teacher (``fidelity.json``).

    A part that is committed already, from the same teacher and the same part of the data, is kept: after data were
    added only what is new is captured.

    Returns:
        what was made (parts, rows, positions, bytes), and what it used.
    """
    spec, store = job.capture, workdir / "store"
    facts = DataFacts.load(workdir / "data")
    plan = _plan(job, workdir, facts)
    data_sha256 = TableReader(workdir / "data" / SPLIT).facts["part_sha256"]
    done = start(store, plan, data_sha256)
    todo: list[int | str] = [part for part in range(plan.parts) if part not in done]
    fidelity = read(store, plan) if spec.fidelity_positions else None
    kept = numbers(fidelity) if fidelity else {}
    if spec.fidelity_positions and fidelity is None:
        # First, so that nobody waits for it at the end while other actors have nothing left to do.
        todo.insert(0, FIDELITY)
    rows, positions = done.rows, 0

    def on_result(shard: Any, result: dict[str, Any]) -> None:
        nonlocal rows, positions, kept
        if shard == FIDELITY:
            kept = result
            return
        rows, positions = rows + result["rows"], positions + result["tokens"]
        on_progress(rows, facts.splits["train"]["rows"], f"{positions:,} positions")

    task = CaptureTask(
        teacher=workdir / "teacher" / "model",
        data=workdir / "data",
        store=store,
        batch_tokens=spec.batch_tokens,
        precision=spec.precision,
        cores=spec.cpus_per_actor,
        devices=spec.gpus_per_actor,
        fidelity_positions=spec.fidelity_positions,
    )
    usage = Usage()
    if todo:
        crews = [
            Crew(
                lambda: CaptureWorker(task),
                most=kind.most,
                least=kind.least,
                cpus=kind.cpus_per_actor,
                gpus=kind.gpus_per_actor,
                accelerator=kind.accelerator,
                resources=kind.resources,
                name=kind.name,
            )
            for kind in spec.crews
        ]
        usage = map_shards(
            session, crews, todo, on_result, retries=spec.retries, fatal=(DistillError,), what="capture"
        ).usage
    manifest = finish(store, plan, start(store, plan, data_sha256))
    made = {name: manifest[name] for name in ("parts", "rows", "tokens", "bytes")}
    moved = Usage(rows=rows, tokens=positions, bytes_written=manifest["bytes"])
    told = {"store": {"fidelity": kept}} if kept else {}
    return {**made, "parts_kept": len(done), **told}, usage + moved


def _plan(job: Job, workdir: Folder, facts: DataFacts) -> StorePlan:
    teacher = workdir / "teacher" / "model"
    return StorePlan.make(
        facts=facts,
        codec=make_codec(job.capture.codec, facts),
        teacher=model_digest(teacher),
        outputs=int(read_serving(teacher)[0]["outputs"]),
        seed=job.capture.seed,
        precision=job.capture.precision,
    )
