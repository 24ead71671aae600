"""Whole pipelines against a real MLflow server that dies on the way; and what a person sees there, in a browser."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow_server
import pytest
from browser import PROGRAM, Browser
from conftest import Distill, digits_spec, write_spec
from mlflow_server import PASSWORD, USER, Team

from cluster.files import Folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def team(s3: Callable[[str], Folder], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    place = tmp_path_factory.mktemp("mlflow")
    with mlflow_server.team(place, s3("artifacts")) as running, pytest.MonkeyPatch.context() as patch:
        # Specs name no server: the environment does.
        patch.setenv("MLFLOW_TRACKING_URI", running.server.uri)
        yield running


@pytest.fixture(scope="module")
def client(team: Team) -> Any:
    import mlflow

    return mlflow.MlflowClient(tracking_uri=team.server.uri)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def spec_of(folder: Path, digits: Path, name: str, seeds: list[int]) -> Path:
    train = {"epochs": 12, "batch_size": 64, "learning_rate": 0.003}
    spec = digits_spec(digits, folder / name, student__train=train, seeds=seeds)
    return write_spec(folder / f"{name}.yaml", {**spec, "name": name, "tracking": {"experiment": "digits"}})


@pytest.fixture(scope="module")
def calm(team: Team, folder: Path, digits: Path, distill: Distill) -> str:  # noqa: ARG001
    """A first pipeline, which nothing disturbs."""
    done = distill("run", spec_of(folder, digits, "calm", [0]), timeout=700)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waits in" not in done.stdout and PASSWORD not in done.stdout + done.stderr
    return "calm"


class Command:
    """``distill run`` as a process of its own."""

    def __init__(self, spec: Path) -> None:
        program = Path(sys.executable).with_name("distill")
        self.output = spec.with_suffix(".log")
        self._process = subprocess.Popen(
            [program, "run", spec], stdout=self.output.open("w"), stderr=subprocess.STDOUT, env={**os.environ}
        )

    def until(self, true: Callable[[], bool], seconds: float = 400) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert self._process.poll() is None and time.monotonic() < end, self.output.read_text()
            time.sleep(0.2)

    def wait(self) -> str:
        assert self._process.wait(700) == 0, self.output.read_text()
        return self.output.read_text()


def runs_of(client: Any, name: str) -> dict[str, Any]:
    """The runs of a pipeline by their names, and that none is there twice."""
    experiment = client.get_experiment_by_name("digits")
    [parent] = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    under = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    runs = {run.info.run_name: run for run in [parent, *under]}
    assert len(runs) == 1 + len(under)
    return runs


def in_training(client: Any, name: str) -> bool:
    try:
        return "train/loss" in runs_of(client, name)["student/0"].data.metrics
    except (KeyError, ValueError, AttributeError):
        return False


def losses(arm: Path) -> list[tuple[int, float]]:
    """Step and loss, where it was reported."""
    history = json.loads((arm / "history.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def check(client: Any, folder: Path, name: str) -> None:
    """That MLflow has what the workdir has: every step once, the costs of the ledger, models and artifacts."""
    runs, workdir = runs_of(client, name), folder / name
    assert {"teacher", "capture", "student/0", "baseline/0", "evaluate", "audit"} <= set(runs)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for arm in ("student/0", "baseline/0"):
        logged = client.get_metric_history(runs[arm].info.run_id, "train/loss")
        assert [(m.step, m.value) for m in logged] == losses(workdir / arm) and len(logged) > 3
    ledger = json.loads((workdir / "ledger.json").read_text())
    assert runs[name].data.metrics["cost/usd"] == pytest.approx(ledger["totals"]["usd"])
    for entry in ledger["entries"]:
        if entry["stage"] in runs:
            assert runs[entry["stage"]].data.metrics["cost/usd"] == pytest.approx(entry["usd"])
    assert {"report.html", "ledger.json"} <= {a.path for a in client.list_artifacts(runs[name].info.run_id)}
    for role in ("teacher", "student"):
        seeds = {arm for arm in runs if arm.startswith(role)}
        assert len(client.search_model_versions(f"name = '{name}-{role}'")) == len(seeds)


def test_a_pipeline_arrives_whole(calm: str, client: Any, folder: Path) -> None:
    check(client, folder, calm)


@pytest.fixture(scope="module")
def disturbed(team: Team, client: Any, folder: Path, digits: Path, distill: Distill) -> str:
    """One more seed; its server dies in the training, comes back, and dies again until the command has ended."""
    spec = spec_of(folder, digits, "disturbed", [0, 1])
    command, workdir = Command(spec), folder / "disturbed"
    command.until(lambda: in_training(client, "disturbed"))
    team.server.kill()
    command.until(lambda: (workdir / "outbox").exists())
    team.server.start()
    command.until(lambda: "answers again" in command.output.read_text())
    team.server.kill()
    printed = command.wait()
    assert "has stopped taking what is logged" in printed
    assert "the next `distill` command on this workdir, or `distill report SPEC`, sends it" in printed
    assert (workdir / "report.html").exists() and len(list((workdir / "outbox").glob("*.json"))) > 0
    team.server.start()
    done = distill("report", spec)
    assert done.returncode == 0 and "waits in" not in done.stdout, done.stdout + done.stderr
    return "disturbed"


def test_nothing_is_lost_and_the_training_is_the_same(calm: str, disturbed: str, client: Any, folder: Path) -> None:
    check(client, folder, disturbed)
    for arm in ("student/0", "baseline/0"):
        assert losses(folder / calm / arm) == losses(folder / disturbed / arm)
    assert not list((folder / disturbed / "outbox").glob("*.json"))
    # It was told of long after it ended.
    ended = runs_of(client, disturbed)["audit"].info.end_time / 1000
    assert ended <= (folder / disturbed / "report.html").stat().st_mtime + 1


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    started = Browser(tmp_path / "profile")
    yield started
    started.close()


@pytest.mark.skipif(PROGRAM is None, reason="chromium isn't installed here (Debian's package chromium)")
def test_a_person_who_compares_sees_costs_beside_quality(
    team: Team, calm: str, disturbed: str, client: Any, browser: Browser
) -> None:
    runs = {name: runs_of(client, name)[name] for name in (calm, disturbed)}
    experiment = client.get_experiment_by_name("digits").experiment_id
    with browser.page() as page:
        page.login(USER, PASSWORD)
        ids = ",".join(f"%22{run.info.run_id}%22" for run in runs.values())
        page.open(f"{team.server.uri}/#/compare-runs?runs=[{ids}]&experiments=[%22{experiment}%22]")
        words = ["quality/student_accuracy", "cost/usd", calm, disturbed]
        page.wait(f"{json.dumps(words)}.every(word => document.body.innerText.includes(word))")
        for name in ("cost/usd", "cost/kwh", "quality/gain", "quality/student_accuracy"):
            page.wait(f"({CELLS})('{name}').length == 2")
            shown = [float(cell) for cell in page.value(f"({CELLS})('{name}')")]
            for value, run in zip(shown, runs.values(), strict=True):
                assert value == pytest.approx(run.data.metrics[name], rel=0.01, abs=0.0006), name


# The numbers to the right of a metric's name, on its line of the nearest table: the name stands in the plot's menus as
# well, and other tables may lie at the same height, scrolled out of sight.
CELLS = """name => {
    const named = [...document.querySelectorAll('a[title="Plot chart"]')].find(each => each.innerText.trim() == name);
    if (!named) return [];
    const middle = each => (each.getBoundingClientRect().top + each.getBoundingClientRect().bottom) / 2;
    const left = each => each.getBoundingClientRect().left;
    for (let box = named.parentElement; box; box = box.parentElement) {
        const line = [...box.querySelectorAll("*")]
            .filter(each => !each.children.length && each.innerText?.trim() && isFinite(each.innerText))
            .filter(each => Math.abs(middle(each) - middle(named)) < 12 && left(each) > left(named));
        if (line.length) return line.sort((one, other) => left(one) - left(other)).map(each => each.innerText.trim());
    }
    return [];
}"""
