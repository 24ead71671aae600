"""Prepare only the first rows of a job's data, to probe real models on real rows before anything is spent."""

import time
from collections import deque
from dataclasses import replace

from cluster.files import Folder
from distill_jobs.costs.rates import Sizes
from distill_jobs.data.encoder import ENCODER, Encoder
from distill_jobs.data.facts import SPLITS, DataFacts
from distill_jobs.data.prepare import finish, fitted, plan
from distill_jobs.data.sources import Range
from distill_jobs.data.table import MANIFEST
from distill_jobs.data.workers import FitWorker, PrepareWorker
from distill_jobs.spec import Job

_DOCUMENTS, _ROWS = 64, 4096


def counts(data: Folder) -> Sizes:
    """The sizes of prepared data."""
    facts = DataFacts.load(data)
    table = (data / "train").read_json(MANIFEST)
    rows = {f"{split}_rows": facts.splits[split]["rows"] for split in SPLITS}
    return Sizes(
        source_rows=sum(rows.values()),
        prepare_row_seconds=0.0,
        row_bytes=table["bytes"] / max(1, table["rows"]),
        **rows,
    )


def prepare_sample(job: Job, folder: Folder) -> Sizes:
    """Prepare the first rows of each source group in ``folder``/data; returns the sizes of the whole, blown up.

    Raises:
        DataError: as the whole prepare stage would, for what the first rows show.
    """
    rows = min(job.data.rows_per_part, _DOCUMENTS if job.task == "causal_lm" else _ROWS)
    shares = {s: getattr(job.data, s) for s in SPLITS if isinstance(getattr(job.data, s), float)}
    # A few rows may leave a split empty that the whole does not: here all of them are for training.
    changes = {"rows_per_part": rows, **dict.fromkeys(shares, 0.0)}
    small = job.model_copy(update={"data": job.data.model_copy(update=changes)})
    started = time.perf_counter()
    work, shards = plan(small, folder / "data")
    first: dict[str, list[Range]] = {group: some[:1] for group, some in shards.items()}
    if job.data.features.kind == "tabular" or (job.task == "classification" and job.data.classes is None):
        deque(map(FitWorker(work).run, first["train"]), maxlen=0)
        work = fitted(small, work, 1)
        _keep_encoder(job, work.folder)
    worker = PrepareWorker(work)
    for some in first.values():
        deque(map(worker.run, some), maxlen=0)
    facts, _ = finish(small, work, first)
    seconds = time.perf_counter() - started
    every, sampled = ({group: sum(shard.rows for shard in some) for group, some in s.items()} for s in (shards, first))
    rows_of = {group: facts.splits[group]["rows"] * every[group] / sampled[group] for group in shards}
    rows_of |= {split: rows_of["train"] * share for split, share in shares.items()}
    rows_of["train"] *= 1 - sum(shares.values())
    return replace(
        counts(folder / "data"),
        source_rows=sum(every.values()),
        prepare_row_seconds=seconds / sum(sampled.values()),
        **{f"{split}_rows": round(rows_of[split]) for split in SPLITS},
    )


def _keep_encoder(job: Job, data: Folder) -> None:
    """A model that another job saved takes rows as its own encoder gives them, which was not fitted on a few rows."""
    saved = next((m.saved for m in (job.teacher.model, job.student.model) if m.saved is not None), None)
    tabular = job.data.features.tabular
    if saved is None or tabular is None or not Folder(saved).exists(ENCODER):
        return
    own = Encoder.load(Folder(saved))
    if [c[0] for c in (*own.numeric, *own.categorical)] == [*tabular.numeric, *tabular.categorical]:
        data.write(ENCODER, Folder(saved).read(ENCODER))
