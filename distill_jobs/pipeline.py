"""The whole story on one page: teach, capture, train, and reckon.

Each stage reads what earlier stages committed under the workdir and commits its own ``stage.json`` last. A stage whose
inputs have not changed is skipped, so that any command can be stopped at any moment and run again.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import yaml

from cluster.files import Folder
from cluster.gang import run_gang
from cluster.meter import Meter, Usage
from cluster.shards import map_shards
from cluster.standing import in_words
from distill_jobs.accounts import close_accounts, forward_flops, leave_to_the_unfinished, live_held
from distill_jobs.advising import reach_verdict
from distill_jobs.audit.evaluate import evaluate as evaluate_models
from distill_jobs.audit.findings import mistakes, refuse_gaps
from distill_jobs.audit.stage import audit as audit_models
from distill_jobs.audit.stage import count_mistakes, judged_class
from distill_jobs.capture.crews import crew_of
from distill_jobs.capture.stage import capture as capture_store
from distill_jobs.console import Advance
from distill_jobs.context import Context, Made
from distill_jobs.costs.ledger import headlines, unfinished
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.prepare import prepare as prepare_data
from distill_jobs.errors import DistillError, NotReadyError, SpecError
from distill_jobs.inputs import STAGES, arms_of, statuses_of, teacher_arm
from distill_jobs.live import show_training
from distill_jobs.models.bring import BringWorker
from distill_jobs.models.files import model_digest
from distill_jobs.outcome import log_outcome, print_summary
from distill_jobs.planning import foretell
from distill_jobs.report.html import render
from distill_jobs.spec import Job, Train
from distill_jobs.stage import StageRecord, status
from distill_jobs.store.codecs import make_codec
from distill_jobs.store.plan import check_teacher
from distill_jobs.training.arm import train_arms
from distill_jobs.training.gangs import gang_of, task_of
from distill_jobs.training.source import open_stores, open_teachers
from distill_jobs.training.task import Arm
from distill_jobs.words import money


def run(context: Context, wanted: tuple[str, ...] = STAGES) -> None:
    """Do the wanted stages in order, skip what is done, and print what came out."""
    job = context.job
    context.workdir.write("spec.yaml", yaml.safe_dump(job.model_dump(mode="json", exclude_none=True)).encode())
    if wanted == STAGES:
        context.expected = foretell(context)
    for stage in STAGES:
        if stage in wanted:
            _require_earlier(context, stage)
            DO[stage](context)
    if STAGES[-1] in wanted:
        print_summary(context)
    if survived := in_words(context.live.faults()):
        context.console.say(f"survived: {survived}")
    if "audit" in wanted:
        # Last, so that a job that fails its release gate still has its report.
        refuse_gaps(context.workdir)


def prepare(context: Context) -> None:
    """Rows with stable ids, tokenised or encoded, split, part by part over a pool of actors."""

    def work(advance: Advance) -> tuple[Made, Usage]:
        facts, usage = prepare_data(context.job, context.session, context.workdir, advance)
        rows = {f"{split}_rows": sizes["rows"] for split, sizes in facts.splits.items()}
        return {**rows, "dropped": facts.dropped}, usage

    context.do("prepare", context.workdir / "data", work)
    # What the audit will ask of the classes is told now, while nothing was trained for it.
    judged_class(context.job, DataFacts.load(context.workdir / "data"))


def teach(context: Context) -> None:
    """Train the teacher to convergence, or bring it into the workdir."""
    job, folder = context.job, context.workdir / "teacher"

    def work(advance: Advance) -> tuple[Made, Usage]:
        if job.teacher.train is None:
            return _bring(context, advance)
        arm = teacher_arm(job, context.inputs)
        [record], held = _train_gang(context, arm.train, (arm,), None, advance)
        worked = Usage.of(record["usage"])
        done = Usage(rows=worked.rows, tokens=worked.tokens, bytes_read=worked.bytes_read, flops=worked.flops)
        known = context.ledger.find(unfinished("teacher"))
        return record["made"], held + _earlier([record]).beyond(known.usage if known else Usage()) + done

    context.do("teacher", folder, work, model=folder / "model")


def capture(context: Context) -> None:
    """The teacher's soft labels for every training row, by a pool of actors, into the logit store."""
    if context.job.distill.soft_labels == "live":
        context.console.say("capture: left out, because distill.soft_labels is live: the teacher answers in training")
        return

    def work(advance: Advance) -> tuple[Made, Usage]:
        def priced(usage: Usage) -> str:
            return money(context.priced(usage))

        _check_codec(context)
        made, usage = capture_store(context.job, context.session, context.workdir, advance, priced)
        found, counting = count_mistakes(context.job, context.workdir)
        context.console.say(mistakes(found))
        return {**made, "negative": {name: found[name] for name in ("mistakes", "rate")}}, usage + counting

    context.do("capture", context.workdir / "store", work)


def train(context: Context) -> None:
    """Students on hard and soft labels, and baselines on hard labels alone: same data, steps, start and code."""
    arms = arms_of(context.job, context.inputs)
    pending = []
    for arm in arms:
        found = status(arm.name, arm.folder, arm.inputs)
        if found.done and context.ledger.has(arm.name):
            context.console.skipped(found)
        elif not found.done:
            pending.append(arm)
    usage = Usage()
    live = context.job.distill.soft_labels == "live"
    if pending:
        _check_codec(context) if live else check_store(context)
    try:
        if pending:
            first = pending[0]
            reason = f"{len(pending)} of {len(arms)} arms; {status(first.name, first.folder, first.inputs).reason}"
            bar = context.console.bar("train", context.expected.get("train"), reason)
            with context.attempt("train", live_held(context.job) if live else None) as before, bar as advance:
                store = None if live else context.workdir / "store"
                records, held = _train_gang(context, context.job.student.train, tuple(pending), store, advance)
                usage = held + before + _earlier(records).beyond(before) + _live_teacher(records)
    finally:
        # Arms that were committed count, whatever became of the others.
        spent = _settle_arms(context, arms)
        leave_to_the_unfinished(context, spent)
    if pending:
        now = time.time()
        overhead = usage.beyond(spent)
        context.enter("train/start-up", overhead, now - overhead.wall_seconds, now)
        context.ledger.drop(unfinished("train"))


def evaluate(context: Context) -> None:
    """Teacher, students and baselines on the held-out split."""

    def work(advance: Advance) -> tuple[Made, Usage]:
        models = {"teacher": context.workdir / "teacher" / "model"}
        models |= {arm.name: arm.folder / "model" for arm in arms_of(context.job, context.inputs)}
        evaluation, usage = evaluate_models(context.job, context.session, context.workdir, models, advance)
        made = [context.workdir / "teacher", *(arm.folder for arm in arms_of(context.job, context.inputs))]
        flops = math.fsum(map(forward_flops, made)) * evaluation["tokens"]
        return {"rows": evaluation["rows"], "models": len(models)}, usage + Usage(flops=flops)

    context.do("evaluate", context.workdir / "evaluation", work)


def audit(context: Context) -> None:
    """The ceiling, inherited bias and negative knowledge, by statistics from what was evaluated and captured."""

    def work(advance: Advance) -> tuple[Made, Usage]:
        advance(0, 1)
        return audit_models(context.job, context.workdir)

    context.do("audit", context.workdir / "audit", work)


def report(context: Context) -> None:
    """One page of HTML from what was committed, and the outcome in MLflow."""

    def work(advance: Advance) -> tuple[Made, Usage]:
        advance(0, 1)
        with Meter() as meter:
            close_accounts(context)
            reach_verdict(context.job, context.workdir)
            context.workdir.write("report.html", render(context.workdir).encode())
            log_outcome(context)
        return {}, meter.usage

    if context.do("report", context.workdir / "report", work):
        # Once more, now that the report's own entry is in them.
        context.parent.metrics(headlines(context.ledger.totals()))


DO: dict[str, Callable[[Context], None]] = {
    "prepare": prepare,
    "teach": teach,
    "capture": capture,
    "train": train,
    "evaluate": evaluate,
    "audit": audit,
    "report": report,
}


def _require_earlier(context: Context, stage: str) -> None:
    for earlier in STAGES[: STAGES.index(stage)]:
        for found in statuses_of(context.job, context.inputs, earlier):
            if not found.done:
                verb = f"`distill {earlier} SPEC`"
                raise NotReadyError(f"{stage} needs {found.stage} ({found.reason}); run {verb} or `distill run SPEC`")


def check_store(context: Context) -> None:
    """Refuse to train from a store that isn't whole, or that another teacher or other data made."""
    store, data = context.workdir / "store", context.workdir / "data"
    job = context.job
    opened, own = open_stores(store, data, job.reading, job.distill.mix), 0
    if job.distill.teachers:
        opened = open_teachers(store, data, job.reading, job.distill).stores
        own = next(i for i, one in enumerate(job.distill.teachers) if one.store is None)
    for each in opened:
        _check_loss(job, each.plan.codec, each.plan.classes)
    check_teacher(opened[own].plan, model_digest(context.workdir / "teacher" / "model"), DataFacts.load(data))


def _check_codec(context: Context) -> None:
    """The same of a store that is still to be made, or of what a live teacher says."""
    facts = DataFacts.load(context.workdir / "data")
    codec = make_codec(context.job.capture.codec, facts)
    _check_loss(context.job, {"name": codec.name, **codec.arguments()}, facts.targets)


def _live_teacher(records: list[dict[str, Any]]) -> Usage:
    """What the live teachers of arms have held beside the gang."""
    return sum((Usage.of(record["made"].get("live_teacher", {})) for record in records), Usage())


def _check_loss(job: Job, codec: dict[str, Any], classes: int) -> None:
    """Refuse a loss or gate that a store of this codec can't serve: codec and classes may be known only now."""
    refused = job.refusal(str(codec["name"]), codec, classes)
    if refused:
        raise SpecError(refused)


def _bring(context: Context, advance: Advance) -> tuple[Made, Usage]:
    job, made = context.job, {}
    worker = BringWorker(job.teacher.model, context.workdir / "data", context.workdir / "teacher" / "model")

    def on_result(_: Any, result: Made) -> None:
        made.update(result)
        advance(1, 1)

    crew = crew_of(job.capture.crews[0], lambda: worker, alone=True)
    report = map_shards(context.session, crew, ["teacher"], on_result, retries=0, fatal=(DistillError,), what="teach")
    return made, report.usage


def _train_gang(
    context: Context, train: Train, arms: tuple[Arm, ...], store: Folder | None, advance: Advance
) -> tuple[list[dict[str, Any]], Usage]:
    sizes = train.gang_sizes
    gang = gang_of(train)
    if len(sizes) <= train.most_workers - train.least_workers:
        told = ", ".join(str(size) for size in sizes)
        context.console.say(f"of {train.least_workers} to {train.most_workers} workers {told} can share a batch evenly")
    task = task_of(context.job, arms, train, store)
    order = {arm.name: i for i, arm in enumerate(arms)}

    def on_report(values: dict[str, Any]) -> None:
        arm, step, steps = values.pop("arm"), values.pop("step"), values.pop("of")
        if values.pop("resumed", False):
            context.console.say(f"{arm} goes on from step {step:,} of {steps:,}")
        if bad := values.pop("bad", None):
            context.console.say(f"{arm}: {bad}")
        show_training(arm, step, values, bad)
        context.tracked(arm).metrics({f"train/{name}": v for name, v in values.items()}, step)
        advance(order[arm] * steps + step, len(arms) * steps, arm)

    return run_gang(
        context.session,
        train_arms,
        task,
        gang,
        on_report,
        fatal=(DistillError,),
        what="training",
        on_note=context.console.say,
    )


def _earlier(records: list[dict[str, Any]]) -> Usage:
    """What arms had used, by their last checkpoints, in runs that were killed before this one."""
    return sum((Usage.of(record["usage"]["earlier"]) for record in records), Usage())


def _settle_arms(context: Context, arms: list[Arm]) -> Usage:
    spent = Usage()
    for arm in arms:
        record = StageRecord.read(arm.folder)
        if record is None or record.digest != arm.digest or context.ledger.has(arm.name, since=record.ended):
            continue
        usage = Usage.of(record.usage)
        context.settle(record, usage, arm.folder, arm.folder / "model" if arm.role == "student" else None)
        spent = spent + usage
    return spent
