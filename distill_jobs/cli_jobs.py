"""``distill submit`` and ``distill jobs``: a pipeline as a job of a Ray cluster. Heavy imports come last."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.jobs import Jobs

jobs = typer.Typer(name="jobs", help="Jobs on a Ray cluster: list, status, logs, stop.", no_args_is_help=True)

Spec = Annotated[str, typer.Argument(metavar="SPEC", help="The job spec, a YAML file.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a value of the spec: --set distill.temperature=4")
]
Id = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as `distill submit` printed it.")]
Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS",
        help="The dashboard of the cluster's head, as http://head:8265; its token comes from RAY_AUTH_TOKEN(_PATH).",
    ),
]


def submit(
    spec: Spec,
    overrides: Set = None,
    address: Address = None,
    do: Annotated[str, typer.Option(help="What the job does: run, or one stage, or tune.")] = "run",
    env: Annotated[
        list[str] | None,
        typer.Option(help="For the job's processes: NAME=VALUE, or NAME for its value here. No secrets."),
    ] = None,
    follow: Annotated[bool, typer.Option(help="Show what the job prints; Ctrl-C leaves it running.")] = True,
    check: Annotated[bool, typer.Option(help="Look at the cluster first, and refuse what could not run there.")] = True,
    ship_code: Annotated[bool, typer.Option(help="Run this machine's code; else that of the nodes.")] = True,
    driver_cpus: Annotated[
        float, typer.Option(min=0, help="CPUs that the command itself holds; with 0 it runs on the head.")
    ] = 0.0,
    driver_resource: Annotated[
        str | None, typer.Option(help="A resource of the nodes that the command is to run on, as a pool's name.")
    ] = None,
) -> None:
    """Run a job on a Ray cluster: pack it, check that it can run there, start it, and show what it prints."""
    from distill_jobs.spec import load_job

    job = load_job(spec, overrides)
    from cluster.jobs import Jobs
    from distill_jobs import submitting
    from distill_jobs.console import Console
    from distill_jobs.errors import SpecError

    if do not in submitting.VERBS:
        raise SpecError(f"--do takes one of {', '.join(submitting.VERBS)}, not {do}")
    resources = {driver_resource: 0.001} if driver_resource else {}
    options = submitting.Options(do, check, ship_code, submitting.parse_env(env or []), driver_cpus, resources)
    found, console = Jobs(address), Console()
    job_id = submitting.submit(job, found, options, console)
    where = "" if address is None else f" --address {found.address}"
    console.say(
        f"started {job_id}\n"
        f"  what it prints: distill jobs logs {job_id} --follow{where}\n"
        f"  end it:         distill jobs stop {job_id}{where}"
    )
    if follow:
        _follow(job_id, found)


@jobs.command("list")
def list_jobs(address: Address = None) -> None:
    """The jobs that were submitted to the cluster, the latest first."""
    from cluster.jobs import Jobs
    from distill_jobs.console import Console
    from distill_jobs.submitting import NAME, VERB, WORKDIR
    from distill_jobs.words import ago, duration

    rows = []
    for job in Jobs(address).all():
        if WORKDIR in job.metadata:
            took = duration(job.ended - job.started) if job.started and job.ended else ""
            began = ago(job.started) if job.started else ""
            rows.append(
                [job.id, job.metadata.get(NAME), job.metadata.get(VERB), job.status, began, took, job.metadata[WORKDIR]]
            )
    if not rows:
        Console().say("no job was submitted to this cluster; `distill submit SPEC` does")
        return
    Console().table("", ["job", "name", "does", "state", "started", "took", "workdir"], rows)


@jobs.command()
def status(
    job_id: Id,
    address: Address = None,
) -> None:
    """The state of a job, as JSON."""
    from cluster.jobs import Jobs
    from distill_jobs.console import Console
    from distill_jobs.submitting import described

    Console().say(described(Jobs(address).get(job_id)))


@jobs.command()
def logs(
    job_id: Id,
    address: Address = None,
    follow: Annotated[bool, typer.Option(help="Go on until the job is over.")] = False,
) -> None:
    """What a job has printed."""
    from cluster.jobs import Jobs

    found = Jobs(address)
    if follow:
        _follow(job_id, found)
    typer.echo(found.logs(job_id), nl=False)


@jobs.command()
def stop(job_id: Id, address: Address = None) -> None:
    """End a job: what it has committed stays, and the same job submitted again goes on from there."""
    from cluster.jobs import Jobs
    from distill_jobs.console import Console

    found = Jobs(address)
    if (job := found.get(job_id)).over:
        Console().say(f"{job_id} has {job.status.lower()} already")
        return
    ended = found.stop(job_id)
    Console().say(f"{job_id} has {ended.status.lower()}; submitted again it goes on from what was committed")


def _follow(job_id: str, jobs: "Jobs") -> None:
    from distill_jobs.console import Console
    from distill_jobs.submitting import exit_code, follow

    console = Console()
    try:
        job = follow(job_id, jobs, console)
    except KeyboardInterrupt:
        console.say(f"\n{job_id} goes on; `distill jobs logs {job_id} --follow` shows it again")
        raise typer.Exit(0) from None
    raise typer.Exit(exit_code(job))
