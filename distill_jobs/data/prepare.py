"""The prepare stage: the user's files become ``data/``, part by part over a pool of actors.

``survey`` → (``fit``) → ``cut``. Range i of a source group gives part i of each split cut from it, so that the outcome
is the same whatever the number of actors, and a run that was killed goes on with the parts that are missing.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

from cluster.files import Folder, digest
from cluster.meter import Meter, Usage
from cluster.session import Session
from cluster.shards import Crew, Worker, map_shards
from distill_jobs.data import tokenizer
from distill_jobs.data.commits import Commits
from distill_jobs.data.encoder import Encoder, Tally
from distill_jobs.data.facts import SPLITS, DataFacts
from distill_jobs.data.rows import check_columns
from distill_jobs.data.sources import Range, Survey, ranges, save_survey, survey
from distill_jobs.data.table import MANIFEST, PartRecord
from distill_jobs.data.values import sorted_classes, text_of
from distill_jobs.data.workers import (
    FIT,
    FitWorker,
    PrepareWorker,
    Work,
    check_class_count,
    fit_name,
    needed_columns,
    text_column,
)
from distill_jobs.errors import DataError, DistillError
from distill_jobs.spec import Job

# Raised when the same spec and files would give other data: everything prepared by older code is then made again.
_VERSION = 1
Progress = Callable[[int, int], None]
Shards = dict[str, list[Range]]


def prepare(job: Job, session: Session, workdir: Folder, on_progress: Progress) -> tuple[DataFacts, Usage]:
    """Prepare the data of a job in ``workdir``/data.

    Args:
        on_progress: told the source rows worked through and their total; rows that are read twice (once to fit an
            encoder or find the classes) count twice.

    Returns:
        The facts of the data, and what preparing them has used.

    Raises:
        DataError: something is wrong with the files, the columns or a row; no manifest is written then.
    """
    folder = workdir / "data"
    with Meter() as meter:
        work, shards = plan(job, folder)
        done = _already(folder, work.inputs)
    if done is not None:
        return done, meter.usage
    usage = meter.usage
    passes = _Passes(job, session, on_progress, sum(shard.rows for group in shards.values() for shard in group))
    if _must_fit(job):
        usage += passes.fit(work, shards["train"])
        work = fitted(job, work, len(shards["train"]))
    usage += passes.cut(work, shards)
    with Meter() as meter:
        facts, written = finish(job, work, shards)
    usage += meter.usage
    rows, tokens = (sum(split[what] for split in facts.splits.values()) for what in ("rows", "tokens"))
    return facts, dataclasses.replace(usage, rows=rows, tokens=tokens, bytes_written=written)


def data_digest(job: Job) -> str:
    """The digest of the data spec and the source files' content: the fingerprint that preparing would give.

    Nothing is run or written; files that an earlier run has surveyed and that have not changed are not read.

    Raises:
        DataError: a file is missing, can't be read, or a group of files holds no rows.
    """
    return _digest(job, survey(job.data, Folder(job.workdir) / "data"))


def plan(job: Job, folder: Folder) -> tuple[Work, Shards]:
    """Survey the files, check their columns, convert the tokenizer: all that happens before rows are read."""
    surveyed = survey(job.data, folder)
    check_columns(surveyed, needed_columns(job.data), text_column(job.data))
    source = tokenizer.tokenizer_of(job)
    work = Work(job.data, folder, _digest(job, surveyed), classes=_given_classes(job))
    if source is not None:
        facts = tokenizer.convert(source, folder)
        if facts.end_id is None and job.task == "causal_lm":
            raise DataError(f"the tokenizer {source} has no end-of-sequence token to end a document with")
        work = dataclasses.replace(work, tokenizer=facts)
    save_survey(surveyed, folder)
    return work, ranges(surveyed, job.data.rows_per_part)


def fitted(job: Job, work: Work, count: int) -> Work:
    """Merge what the first pass left in ``fit/``: writes ``encoder.json``, and names the classes if the spec didn't."""
    tally, found = Tally(), set[str]()
    for number in range(count):
        result = (work.folder / FIT).read_json(fit_name(number))
        tally.merge(Tally.of(result["tally"]))
        found.update(result["labels"])
        check_class_count(len(found), str(job.data.label))
    tabular = job.data.features.tabular
    if not found or (tabular is not None and not tally.counts and not any(m.count for m in tally.moments.values())):
        raise _nothing_left("train")
    if tabular is not None:
        Encoder.fit(tally, tabular).save(work.folder)
    classes = work.classes or _several(job, sorted_classes(sorted(found)))
    return dataclasses.replace(work, classes=classes)


def finish(job: Job, work: Work, shards: Shards) -> tuple[DataFacts, int]:
    """Write the three splits' manifests and then the data's own, which declares them complete.

    Returns:
        the data's facts, and the bytes of all parts.
    """
    splits: dict[str, dict[str, int]] = {}
    dropped, size = Counter[str](), 0
    facts = _facts(job, work)
    for name in SPLITS:
        parts = len(shards.get(name, shards["train"]))
        commits = Commits.open(work.folder / name, parts, work.inputs)
        if not commits.rows and getattr(job.data, name) != 0.0:
            raise _nothing_left(name)
        for record in commits.records():
            dropped.update(record.extra.get("dropped", {}))
        commits.manifest(rows_per_batch=facts.rows_per_batch, inputs=work.inputs)
        splits[name] = {"rows": commits.rows, "tokens": commits.tokens, "parts": parts}
        size += commits.bytes
    facts = dataclasses.replace(facts, splits=splits, dropped=dict(dropped))
    facts.save(work.folder)
    (work.folder / FIT).clear()
    return facts, size


class _Passes:
    """The two passes over the pool of actors, with their progress told as one."""

    def __init__(self, job: Job, session: Session, on_progress: Progress, rows: int) -> None:
        self._job, self._session, self._on_progress = job, session, on_progress
        self._total, self._done = rows, 0

    def fit(self, work: Work, shards: list[Range]) -> Usage:
        self._total += sum(shard.rows for shard in shards)
        folder = work.folder / FIT
        there = set(folder.names(".json"))
        names = {shard.number: fit_name(shard.number) for shard in shards}
        done = {n for n, name in names.items() if name in there and folder.read_json(name)["inputs"] == work.inputs}
        return self._run(functools.partial(FitWorker, work), shards, lambda shard: shard.number in done, lambda _: None)

    def cut(self, work: Work, shards: Shards) -> Usage:
        every = [shard for group in shards.values() for shard in group]
        commits: dict[str, Commits] = {}
        for group, some in shards.items():
            commits |= {s: Commits.open(work.folder / s, len(some), work.inputs) for s in work.splits(group)}

        def is_done(shard: Range) -> bool:
            return all(shard.number in commits[split] for split in work.splits(shard.group))

        def on_result(records: dict[str, PartRecord]) -> None:
            for split, record in records.items():
                commits[split].add(record)

        return self._run(functools.partial(PrepareWorker, work), every, is_done, on_result)

    def _run(
        self,
        make: Callable[[], Worker],
        shards: list[Range],
        is_done: Callable[[Range], bool],
        on_result: Callable[[Any], None],
    ) -> Usage:
        left = [shard for shard in shards if not is_done(shard)]
        self._advance(sum(shard.rows for shard in shards) - sum(shard.rows for shard in left))
        if not left:
            return Usage()
        data = self._job.data

        def on_shard(shard: Range, result: Any) -> None:
            on_result(result)
            self._advance(shard.rows)

        report = map_shards(
            self._session,
            Crew(make, most=data.actors, least=data.actors, cpus=data.cpus_per_actor),
            left,
            on_shard,
            fatal=(DistillError,),
            what="prepare",
        )
        return report.usage

    def _advance(self, rows: int) -> None:
        self._done += rows
        self._on_progress(self._done, self._total)


def _digest(job: Job, surveyed: Survey) -> str:
    spec = job.data.model_dump(mode="json", exclude={"format", "actors", "cpus_per_actor"})
    for name in SPLITS:
        if name in surveyed:
            spec[name] = [[file.name, file.format, file.sha256] for file in surveyed[name]]
    spec["features"][job.data.features.kind].pop("tokenizer", None)
    source = tokenizer.tokenizer_of(job)
    identity = None if source is None else tokenizer.identity(source)
    return digest({"version": _VERSION, "task": job.task, "data": spec, "tokenizer": identity})


def _already(folder: Folder, inputs: str) -> DataFacts | None:
    """The facts of complete data with this very digest; else what declares other data complete is taken away."""
    try:
        facts = DataFacts.load(folder)
        if facts.fingerprint == inputs and all((folder / name).exists(MANIFEST) for name in SPLITS):
            return facts
    except DataError:
        pass
    for place in (folder, *(folder / name for name in SPLITS)):
        place.remove(MANIFEST)
    return None


def _must_fit(job: Job) -> bool:
    return job.data.features.kind == "tabular" or (job.task == "classification" and job.data.classes is None)


def _given_classes(job: Job) -> tuple[str, ...]:
    classes = tuple(text_of(name) for name in job.data.classes or ())
    if len(set(classes)) != len(classes):
        raise DataError(f"data.classes names a class twice: {', '.join(classes)}")
    return _several(job, classes) if job.data.classes is not None else ()


def _several(job: Job, classes: tuple[str, ...]) -> tuple[str, ...]:
    if len(classes) < 2:
        known = classes[0] if classes else "none"
        raise DataError(f"the label {job.data.label} has fewer than two classes ({known}): nothing to classify")
    return classes


def _facts(job: Job, work: Work) -> DataFacts:
    features, known = job.data.features.chosen, work.tokenizer
    shape = getattr(features, "shape", None)
    width = Encoder.load(work.folder).width if job.data.features.kind == "tabular" else None
    return DataFacts(
        task=job.task,
        features=job.data.features.kind,
        fingerprint=work.inputs,
        sequence_length=getattr(features, "sequence_length", getattr(features, "max_length", None)),
        feature_width=shape[0] * shape[1] * shape[2] if shape else width,
        image_shape=shape,
        classes=work.classes,
        vocabulary=known.vocabulary if known else None,
        tokenizer_sha=known.sha if known else None,
        pad_id=known.pad_id if known else None,
        packing=getattr(features, "packing", None),
        slices=job.data.slices,
        reads=features.model_dump(mode="json", exclude={"tokenizer"}),
    )


def _nothing_left(split: str) -> DataError:
    remedy = "give more rows" if split == "train" else f"give more rows or a larger data.{split}"
    return DataError(f"the {split} split is empty: no usable row falls into it; {remedy}")
