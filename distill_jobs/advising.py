"""``distill advise``: is distillation the right tool for the job's goal? From what is known, before a run or after."""

from cluster.files import Folder
from cluster.session import Session
from distill_jobs.console import Console
from distill_jobs.costs import plan
from distill_jobs.costs.advice import decide
from distill_jobs.costs.evidence import gather
from distill_jobs.costs.reckon import Reckoner
from distill_jobs.costs.verdict import VERDICT, Verdict
from distill_jobs.inputs import inputs_of
from distill_jobs.needs import needs_of
from distill_jobs.planning import estimate
from distill_jobs.spec import Job


def advise(job: Job, console: Console) -> None:
    """Print the verdict by the evidence there is; a job that was neither run nor planned is probed first."""
    workdir = Folder(job.workdir)
    if not workdir.exists("audit.json") and plan.read(workdir) is None:
        with Session(job.cluster.address, job.cluster.cpus, job.cluster.gpus) as session:
            session.require(needs_of(job))
            with console.bar("probe", None, "a short look at the real models on real rows"):
                estimate(job, inputs_of(job), session, Reckoner(job.costs))
    print_verdict(decide(job.goal, gather(job, workdir)), console)


def reach_verdict(job: Job, workdir: Folder) -> Verdict:
    """The verdict by the evidence that a run has left; written to ``verdict.json``."""
    verdict = decide(job.goal, gather(job, workdir))
    workdir.write_json(VERDICT, verdict.as_dict())
    return verdict


def print_verdict(verdict: Verdict, console: Console) -> None:
    """The answer, the reasons with where each stands, what speaks against it, and what to do next."""
    unknown = verdict.answer == "not yet known"
    told = "not yet known: measure this first" if unknown else verdict.answer
    console.say(f"verdict for {verdict.goal}: {told}. {verdict.sentence}")
    for reason in verdict.reasons:
        console.say(f"  - {reason.text} ({reason.source})")
    if verdict.against is not None:
        console.say(f"  against it: {verdict.against.text} ({verdict.against.source})")
    if verdict.next is not None:
        console.say(f"  next: {verdict.next}")
