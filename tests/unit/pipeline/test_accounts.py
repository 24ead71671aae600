"""The ledger of a whole pipeline, beside MLflow's real database: attempts that end early, a budget, and what agrees."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest
from rich.console import Console as Rich

from cluster.meter import Usage
from distill_jobs.accounts import leave_to_the_unfinished
from distill_jobs.console import Console
from distill_jobs.context import Context
from distill_jobs.costs.ledger import unfinished
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import BudgetError, DataError
from distill_jobs.pipeline import prepare
from distill_jobs.spec import parse_job
from distill_jobs.stage import StageRecord


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def context(tmp_path: Path, database: str) -> Iterator[Context]:
    with opened(tmp_path, database) as context:
        yield context


def opened(path: Path, database: str, **costs: object) -> Context:
    (path / "a.csv").write_text("a,y\n1,0\n2,1\n")
    train = {"epochs": 1.0}
    tree = {
        "name": "costly",
        "task": "classification",
        "workdir": str(path / "run"),
        "data": {"train": str(path / "a.csv"), "label": "y", "features": {"tabular": {"numeric": ["a"]}}},
        "teacher": {"model": {"mlp": {}}, "train": train},
        "student": {"model": {"mlp": {}}, "train": train},
        "tracking": {"uri": database, "experiment": path.name},
        "costs": {"override": {"cpu_hour": 3600.0}, **costs},
    }
    context = Context(parse_job(tree), Console(Rich(file=io.StringIO())))
    # What needs a cluster is only asked for its accelerators here.
    context.__dict__["session"] = SimpleNamespace(accelerator=lambda: None)
    return context


def used(cores: float) -> Usage:
    return Usage(core_seconds=cores, cpu_seconds=cores / 2, wall_seconds=cores)


def do(context: Context, cores: float, fail: type[BaseException] | None = None) -> None:
    """The capture, told of as a pool tells of itself, and ended as it may end."""

    def work(_: object) -> tuple[dict[str, int], Usage]:
        context.spending.hear("pool", used(cores))
        if fail is not None:
            raise fail
        (context.workdir / "store").write("part", b"0123456789")
        return {"parts": 1}, used(cores)

    context.do("capture", context.workdir / "store", work)


def test_attempts_that_end_early_count_and_become_part_of_the_stage(context: Context) -> None:
    for attempt, error in enumerate((KeyboardInterrupt, ValueError), 1):
        with pytest.raises(error):
            do(context, 5.0, error)
        [entry] = context.ledger.entries()
        assert (entry.stage, entry.kind) == (unfinished("capture"), "unfinished")
        assert entry.usd == 5.0 * attempt == context.ledger.spent()
    do(context, 7.0)
    [entry] = context.ledger.entries()
    assert (entry.stage, entry.kind, entry.usd) == ("capture", "measured", 17.0)
    assert entry.bytes > 10 and entry.usage.cpu_seconds == 8.5
    record = StageRecord.read(context.workdir / "store")
    assert record is not None and Usage.of(record.usage).core_seconds == 17.0


def test_totals_agree_with_mlflow(context: Context, database: str, tmp_path: Path) -> None:
    do(context, 7.0)
    context.parent.metrics({"cost/usd": context.ledger.totals().usd, "cost/kwh": context.ledger.totals().kwh})
    context.parent.end()
    context.tracker.outbox.drain(10.0)
    client = mlflow.MlflowClient(tracking_uri=database)
    experiment = client.get_experiment_by_name(tmp_path.name)
    runs = {run.info.run_name: run.data.metrics for run in client.search_runs([experiment.experiment_id])}
    [entry] = context.ledger.entries()
    assert runs["capture"]["cost/usd"] == entry.usd == 7.0
    assert runs["capture"]["cost/kwh"] == entry.kwh == pytest.approx(3.5 * 4 / 3.6e6)
    assert runs["capture"]["cost/kg_co2e"] == entry.kg_co2e == pytest.approx(entry.kwh * 0.475)
    assert runs["costly"]["cost/usd"] == math.fsum(e.usd for e in context.ledger.entries())


def test_a_budget_stops_the_stage_and_what_it_used_is_known(tmp_path: Path, database: str) -> None:
    with opened(tmp_path, database, budget_usd=20.0) as context:
        # Ten seconds more at this pace would be ten dollars more.
        with pytest.raises(BudgetError, match=r"of \$20\.00, \$12\.00 is spent, \$12\.00 of it on capture"):
            do(context, 12.0)
        assert context.ledger.spent() == 12.0
    with opened(tmp_path, database, budget_usd=30.0) as context:
        do(context, 7.0)
        assert [(e.stage, e.usd) for e in context.ledger.entries()] == [("capture", 19.0)]
    with opened(tmp_path, database, budget_usd=19.0) as context, pytest.raises(BudgetError, match="is left"):
        context.workdir.remove("store/stage.json")
        do(context, 1.0)


def test_arms_that_are_entered_by_themselves_are_not_counted_twice(context: Context) -> None:
    with pytest.raises(ValueError), context.attempt("train"):
        context.spending.hear("gang", used(30.0))
        raise ValueError
    context.enter("student/0", used(12.0), 0.0, 1.0)
    leave_to_the_unfinished(context, used(12.0))
    assert context.ledger.spent() == pytest.approx(30.0)
    found = context.ledger.find(unfinished("train"))
    assert found is not None and found.usd == pytest.approx(18.0)


def test_a_class_that_the_audit_will_not_find_is_told_before_anything_is_trained(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = DataFacts("classification", "tabular", "f", classes=("no", "yes"))
    facts.save(context.workdir / "data")
    monkeypatch.setattr(context, "do", lambda *_: None)
    prepare(context)
    audit = context.job.audit.model_copy(update={"positive": "maybe"})
    context.job = context.job.model_copy(update={"audit": audit})
    with pytest.raises(DataError, match=r"audit\.positive is .maybe., which is no class; there are no, yes"):
        prepare(context)
