"""The capture stage: a pool of actors takes the parts of the training split and commits the parts of the store."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cluster.files import Folder
from cluster.meter import Usage
from cluster.session import Session
from cluster.shards import Crew, PoolReport, map_shards
from cluster.shards import Progress as PoolProgress
from cluster.standing import STANDING
from distill_jobs.capture.crews import crew_of
from distill_jobs.capture.worker import CaptureTask, CaptureWorker
from distill_jobs.data.commits import Commits
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.reader import TableReader
from distill_jobs.data.table import PartRecord
from distill_jobs.errors import CaptureError, DistillError
from distill_jobs.models.files import model_digest, read_serving
from distill_jobs.spec import Job
from distill_jobs.spec.capture import ActorKind
from distill_jobs.store.codecs import make_codec
from distill_jobs.store.features import FeatureCoding
from distill_jobs.store.fidelity.measure import FIDELITY, numbers, read
from distill_jobs.store.plan import SPLIT, StorePlan
from distill_jobs.store.quarantine import QUARANTINE
from distill_jobs.store.writer import finish, start

Progress = Callable[..., None]
Priced = Callable[[Usage], str]
"""What a usage costs, in words."""


def capture(
    job: Job, session: Session, workdir: Folder, on_progress: Progress, priced: Priced = lambda _: ""
) -> tuple[dict[str, Any], Usage]:
    """Capture the training split, and measure what its codec keeps of the teacher (``fidelity.json``).

    A part that is committed already, from the same teacher and the same part of the data, is kept: after a crash, and
    after data were added, only what is missing is captured.

    Args:
        on_progress: told the rows that are done, their total, and a line about pace, actors and money.

    Returns:
        what was made (parts, rows, positions, bytes …), and what it used.

    Raises:
        CaptureError: the teacher can't score more rows than ``capture.max_quarantined`` allows. What was committed
            stays valid.
    """
    spec, store = job.capture, workdir / "store"
    facts = DataFacts.load(workdir / "data")
    plan = _plan(job, workdir, facts)
    data_sha256 = TableReader(workdir / "data" / SPLIT).facts["part_sha256"]
    commits = start(store, plan, data_sha256)
    known = read(store, plan) if spec.fidelity_positions else None
    measure = bool(spec.fidelity_positions) and known is None
    rows = facts.splits[SPLIT]["rows"]
    book = _Book(commits, rows, spec.quarantine_limit(rows), store, numbers(known) if known else {})
    todo, report = _Todo(commits.missing(), measure), PoolReport()
    if todo:
        book.check()
        crews = [_crew(job, workdir, book.left, kind) for kind in spec.crews]

        def on_pool(progress: PoolProgress) -> None:
            on_progress(commits.rows + commits.quarantined, book.total, _line(progress, priced))
            book.tell(progress)

        report = map_shards(
            session,
            crews,
            todo,
            book.enter,
            retries=spec.retries,
            fatal=(DistillError,),
            what="capture",
            on_progress=on_pool,
        )
    finish(store, plan, commits)
    data = TableReader(workdir / "data" / SPLIT).facts["bytes"]
    moved = Usage(
        rows=book.rows,
        tokens=book.tokens,
        bytes_read=data * book.rows // max(1, rows),
        bytes_written=book.bytes,
        flops=book.flops,
    )
    return book.made(report), _by_accelerator(report, spec.crews, session.accelerator()) + moved


@dataclass
class _Book:
    """What the driver keeps of a capture: totals, never results."""

    commits: Commits
    total: int
    limit: int
    store: Folder
    fidelity: dict[str, Any]
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    flops: float = 0.0
    reasons: list[tuple[str, str]] = field(default_factory=list)
    told: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kept = len(self.commits)

    @property
    def left(self) -> int:
        """How many more rows may be put into quarantine."""
        return self.limit - self.commits.quarantined

    def enter(self, shard: Any, result: dict[str, Any]) -> None:
        """Take note of a shard's result."""
        if shard == FIDELITY:
            self.fidelity = result
            return
        self.commits.add(PartRecord(**result["record"]))
        self.rows, self.tokens = self.rows + result["rows"], self.tokens + result["tokens"]
        self.bytes += result["bytes"]
        self.flops += result["flops"]
        self.reasons = [*self.reasons, *result["quarantine_samples"]][:3]
        STANDING.survived("rows_quarantined", result["quarantined"])
        if result["quarantined"]:
            self.check()

    def tell(self, progress: PoolProgress) -> None:
        """Take note of what the actors tell, and show it."""
        told, seconds = dict(progress.told), progress.usage.wall_seconds
        STANDING.add("tokens", max(0.0, told.get("tokens", 0.0) - self.told.get("tokens", 0.0)))
        if seconds:
            STANDING.show("tokens_per_second", told.get("tokens", 0.0) / seconds)
        STANDING.show("store_bytes", self.commits.bytes)
        self.told = told

    def check(self) -> None:
        """Raise CaptureError where more rows are in quarantine than may be."""
        if self.left >= 0:
            return
        said = "".join(f"; {source}: {reason}" for source, reason in self.reasons)
        raise CaptureError(
            f"the teacher can't score {self.commits.quarantined:,} of the {self.total:,} rows, more than the "
            f"{self.limit:,} that capture.max_quarantined allows{said}. Look at {self.store}/{QUARANTINE}, mend the "
            f"data or raise capture.max_quarantined, and run the same command again; what was committed is kept"
        )

    def made(self, report: PoolReport) -> dict[str, Any]:
        """What the stage's record holds."""
        commits, told = self.commits, self.told
        # In the order in which they are told at the end of the stage, which shows the first few.
        names = ("parts", "rows", *(("quarantined",) if commits.quarantined else ()), "tokens", "bytes", "quarantined")
        found: dict[str, Any] = {name: getattr(commits, name) for name in names} | {"parts_kept": self.kept}
        lived = {name: getattr(report, name) for name in ("retried", "handed_back", "lost_actors", "duplicated")}
        pace: dict[str, float] = {}
        if busy := told.get("busy_seconds"):
            pace = {"teacher_share": told["teacher_seconds"] / busy, "busy_seconds": busy}
        if told.get("tokens"):
            pace["padding_share"] = told.get("padding", 0.0) / (told["tokens"] + told.get("padding", 0.0))
        return {
            **found,
            "capture": {**lived, **pace},
            **({"store": {"fidelity": self.fidelity}} if self.fidelity else {}),
        }


class _Todo(Sequence[int | str]):
    """The shards to do, without a list of them: the fidelity, and the parts that are missing."""

    def __init__(self, missing: np.ndarray, measure: bool) -> None:
        # The measurement first, so that nobody waits for it at the end while others have nothing left to do.
        self._missing, self._first = missing, int(measure)

    def __len__(self) -> int:
        return self._first + len(self._missing)

    def __getitem__(self, index: Any) -> Any:
        return FIDELITY if index < self._first else int(self._missing[index - self._first])


def _crew(job: Job, workdir: Folder, limit: int, kind: ActorKind) -> Crew:
    spec = job.capture
    task = CaptureTask(
        teacher=workdir / "teacher" / "model",
        data=workdir / "data",
        store=workdir / "store",
        batch_tokens=kind.batch_tokens or spec.batch_tokens,
        precision=spec.precision,
        cores=kind.cpus_per_actor,
        devices=kind.gpus_per_actor,
        fidelity_positions=spec.fidelity_positions,
        compile=spec.compile,
        autocast=spec.autocast,
        chunk_positions=spec.chunk_positions,
        quarantine_limit=limit,
        kind=kind.name,
    )
    return crew_of(kind, lambda: CaptureWorker(task))


def _by_accelerator(report: PoolReport, kinds: Sequence[ActorKind], usual: str | None) -> Usage:
    """The pool's usage, its device-seconds told apart by the accelerators of the kinds of actors."""
    seconds: dict[str, float] = {}
    for kind in kinds:
        name, used = kind.accelerator or usual, report.by_crew.get(kind.name)
        if used and used.device_seconds and name:
            seconds[name] = seconds.get(name, 0.0) + used.device_seconds
    return replace(report.usage, by_accelerator=seconds)


def _line(progress: PoolProgress, priced: Priced) -> str:
    """How the pool is doing, for the bar: pace, the teacher's share, actors, money, faults survived."""
    told, wall = progress.told, progress.usage.wall_seconds
    words = []
    if told.get("tokens") and wall:
        words.append(f"{told['tokens'] / wall:,.0f} tokens/s")
    if told.get("busy_seconds"):
        words.append(f"teacher {told['teacher_seconds'] / told['busy_seconds']:.0%}")
    waiting = f" (+{progress.starting} starting)" if progress.starting else ""
    words += [f"{progress.actors} actors{waiting}", priced(progress.usage)]
    if progress.lost_actors or progress.retried:
        words.append(f"{progress.lost_actors} actors lost, {progress.retried} retries")
    return ", ".join(word for word in words if word)


def _plan(job: Job, workdir: Folder, facts: DataFacts) -> StorePlan:
    teacher = workdir / "teacher" / "model"
    return StorePlan.make(
        facts=facts,
        codec=make_codec(job.capture.codec, facts),
        teacher=model_digest(teacher),
        outputs=int(read_serving(teacher)[0]["outputs"]),
        seed=job.capture.seed,
        precision=job.capture.arithmetic,
        features=FeatureCoding.of(job.capture.features),
    )
