"""What a pipeline enters in its ledger beside what each stage has used, and what it notes for that."""

from cluster.files import Folder
from cluster.meter import Usage
from distill_jobs.context import Context
from distill_jobs.costs.ledger import unfinished
from distill_jobs.costs.options import write_alternatives
from distill_jobs.costs.reckon import DECLARED
from distill_jobs.spec import Job
from distill_jobs.stage import StageRecord


def close_accounts(context: Context) -> None:
    """Enter what no stage of its own stands for, and price the alternatives."""
    if context.job.teacher.cost is not None:
        context.ledger.enter(context.reckoner.declared(context.job.teacher.cost))
    else:
        context.ledger.drop(DECLARED)
    context.ledger.enter(context.reckoner.storage(context.ledger.entries()))
    write_alternatives(context.job, context.workdir, context.reckoner, context.accelerator)


def leave_to_the_unfinished(context: Context, settled: Usage) -> None:
    """Take what arms that are entered by themselves have used out of the entry of the attempts that didn't end."""
    known = context.ledger.find(unfinished("train"))
    if known is not None and settled.wall_seconds:
        rest = known.usage.beyond(settled)
        context.enter(known.stage, rest, known.started, known.ended, kind="unfinished")


def forward_flops(folder: Folder) -> float:
    """Operations of a forward pass over a position, as the stage that made the model has noted; 0 where it hasn't."""
    record = StageRecord.read(folder)
    return float((record.made.get("forward_flops") if record else None) or 0.0)


def live_held(job: Job) -> Usage:
    """What a live teacher's actors hold each second while students are trained."""
    kinds = job.capture.crews
    return Usage(
        device_seconds=sum(kind.least * kind.gpus_per_actor for kind in kinds),
        core_seconds=sum(kind.least * kind.cpus_per_actor for kind in kinds),
    )
