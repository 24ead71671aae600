"""The verbs of ``distill``. Each parses first and imports what it needs last, so that ``--help`` answers at once."""

import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from distill_jobs.cli_jobs import Address, jobs, submit
from distill_jobs.cli_store import store

if TYPE_CHECKING:
    from distill_jobs.context import Context
    from distill_jobs.spec import Job

app = typer.Typer(
    name="distill",
    help="Knowledge distillation at cluster scale, with its costs on the table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(store, name="store")
app.add_typer(jobs, name="jobs")

Spec = Annotated[str, typer.Argument(metavar="SPEC", help="The job spec, a YAML file.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a value of the spec: --set distill.temperature=4")
]


def _stages(spec: str, overrides: list[str] | None, wanted: tuple[str, ...] | None) -> None:
    from distill_jobs.spec import load_job

    job = load_job(spec, overrides)
    from distill_jobs.inputs import STAGES
    from distill_jobs.pipeline import run

    _in_context(job, lambda context: run(context, wanted or STAGES))


def _in_context(job: "Job", work: "Callable[[Context], None]") -> None:
    from distill_jobs.console import Console
    from distill_jobs.context import Context
    from distill_jobs.errors import StoppedError

    try:
        with Context(job, Console()) as context:
            work(context)
    except KeyboardInterrupt:
        # Told here, since the command-line library would answer an interrupt with a bare exit.
        raise StoppedError("stopped; what was committed stays, and the same command goes on from there") from None


@app.command()
def run(spec: Spec, overrides: Set = None) -> None:
    """Do all stages in order; skip what is done."""
    _stages(spec, overrides, None)


app.command()(submit)


@app.command()
def plan(spec: Spec, overrides: Set = None) -> None:
    """Print the resolved spec, what would run and why, and what it would take."""
    from distill_jobs.spec import load_job

    job = load_job(spec, overrides)
    from distill_jobs.console import Console
    from distill_jobs.planning import print_plan

    print_plan(job, Console())


@app.command()
def advise(spec: Spec, overrides: Set = None) -> None:
    """Say whether distillation is the right tool for the spec's goal, by what is known before a run or after it."""
    from distill_jobs.spec import load_job

    job = load_job(spec, overrides)
    from distill_jobs.advising import advise
    from distill_jobs.console import Console

    advise(job, Console())


@app.command()
def prepare(spec: Spec, overrides: Set = None) -> None:
    """Tokenise or encode the data, split it, and give every row its id."""
    _stages(spec, overrides, ("prepare",))


@app.command()
def teach(spec: Spec, overrides: Set = None) -> None:
    """Train the teacher to convergence, or bring one into the workdir."""
    _stages(spec, overrides, ("teach",))


@app.command()
def capture(spec: Spec, overrides: Set = None) -> None:
    """Run the teacher over all training rows into the logit store."""
    _stages(spec, overrides, ("capture",))


@app.command()
def train(spec: Spec, overrides: Set = None) -> None:
    """Train the students, and the no-teacher baselines, from the store."""
    _stages(spec, overrides, ("train",))


@app.command()
def tune(
    spec: Spec,
    overrides: Set = None,
    trials: Annotated[int | None, typer.Option(min=1, help="How many trials for each of student and baseline.")] = None,
) -> None:
    """Search T, alpha and any other setting, all trials from the one store; write the best as a spec."""
    from distill_jobs.spec import load_job

    job = load_job(spec, [*(overrides or []), *([f"tune.trials={trials}"] if trials is not None else [])])
    from distill_jobs.tune import space_of
    from distill_jobs.tune import tune as search

    space_of(job)
    _in_context(job, search)


@app.command()
def evaluate(spec: Spec, overrides: Set = None) -> None:
    """Measure teacher, students and baselines on the held-out split."""
    _stages(spec, overrides, ("evaluate",))


@app.command()
def audit(spec: Spec, overrides: Set = None) -> None:
    """Reckon: how far from the ceiling, which bias was inherited, which of the teacher's mistakes were learnt."""
    _stages(spec, overrides, ("audit",))


@app.command()
def report(
    spec: Spec,
    overrides: Set = None,
    to: Annotated[str | None, typer.Option(help="Copy the page here too, from a workdir that is far away.")] = None,
) -> None:
    """Write the report, and the outcome to MLflow."""
    _stages(spec, overrides, ("report",))
    if to is not None:
        from pathlib import Path

        from cluster.files import Folder
        from distill_jobs.spec import load_job

        place = Path(to).absolute()
        Folder(str(place.parent)).write(place.name, Folder(load_job(spec, overrides).workdir).read("report.html"))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN…", help="Pipelines: ids of MLflow runs, or workdirs.")],
    out: Annotated[str, typer.Option(help="The page to write.")] = "compare.html",
    tracking: Annotated[str | None, typer.Option(help="MLflow's address, for runs given by their ids.")] = None,
) -> None:
    """Set pipelines side by side, from MLflow: quality against cost, what differs, costs by stage, verdicts."""
    from distill_jobs.comparing import compare as compare_runs
    from distill_jobs.console import Console

    compare_runs(runs, out, tracking, Console())


@app.command()
def status(
    target: Annotated[str, typer.Argument(metavar="WORKDIR|SPEC|JOB", help="Which pipeline.")],
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Plain values, for scripts.")] = False,
    watch: Annotated[bool, typer.Option(help="Show it until the command there has ended.")] = False,
) -> None:
    """Tell how a pipeline stands: stage, progress, rate, expected end, money, faults survived."""
    from distill_jobs.console import Console
    from distill_jobs.watching import status as tell

    tell(target, address, Console(), as_json=as_json, watch=watch)


@app.command()
def doctor(
    spec: Annotated[str | None, typer.Argument(metavar="[SPEC]", help="What the machine is to do.")] = None,
    overrides: Set = None,
    address: Annotated[
        str | None, typer.Option(help="The Ray cluster: its dashboard as http://head:8265, or as cluster.address.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Plain values, for scripts.")] = False,
) -> None:
    """Tell what this machine or cluster has, what the spec would need, and what is wrong; exit 2 if anything is."""
    from distill_jobs.spec import load_job

    job = load_job(spec, overrides) if spec is not None else None
    from distill_jobs.console import Console
    from distill_jobs.doctor import doctor as look

    if not look(job, address, Console(), as_json=as_json):
        sys.exit(2)


def main() -> None:
    """Run the command; an error of ours is one sentence and an exit code, never a traceback."""
    signal.signal(signal.SIGTERM, _stop)
    told(app)


def told(call: Callable[[], object]) -> None:
    """Call, and exit with one sentence if it raises an error of ours."""
    from cluster import logs
    from cluster.errors import ClusterError
    from distill_jobs.errors import DistillError

    logs.configure()
    try:
        call()
    except (DistillError, ClusterError) as error:
        typer.echo(f"distill: {error}", err=True)
        sys.exit(error.exit_code)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt
