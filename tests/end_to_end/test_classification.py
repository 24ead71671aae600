"""Digits, from the file to the report, by the command that a user types; then again, and with another temperature."""

import json
import math
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import Distill, digits_spec, write_spec

from cluster.files import Folder
from cluster.tracked import read_run
from distill_jobs.comparing import pipeline_of
from distill_jobs.costs.plan import predicted_against_actual
from distill_jobs.store.verify import verify


@pytest.fixture(scope="module")
def job(digits: Path, distill: Distill, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The spec, the workdir and the output of a first whole run."""
    folder = tmp_path_factory.mktemp("runs")
    spec = write_spec(folder / "digits.yaml", digits_spec(digits, folder / "digits"))
    done = distill("run", spec)
    assert done.returncode == 0, done.stdout + done.stderr
    return spec, folder / "digits", done.stdout


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_summary_names_arms_costs_and_places(job: tuple[Path, Path, str]) -> None:
    _, workdir, printed = job
    for word in ("teacher", "student", "baseline", "capture", "baseline", "report.html", "mlflow ui"):
        assert word in printed, printed
    page = (workdir / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>") and "Left out, because" not in page
    for section in ("costs", "quality", "curves", "bias", "negative", "store", "provenance"):
        assert f'<section id="{section}">' in page, section


def test_the_evaluation_is_sound(job: tuple[Path, Path, str]) -> None:
    found = read(job[1] / "evaluation.json")
    assert set(found["models"]) == {"teacher", "student/0", "student/1", "baseline/0", "baseline/1"}
    assert found["models"]["teacher"]["accuracy"] > 0.9
    assert found["models"]["teacher"]["agreement"] == 1 and found["models"]["teacher"]["kl_to_teacher"] < 1e-9
    for name, measured in found["models"].items():
        assert 0.3 < measured["accuracy"] <= 1, name
        assert (
            measured["latency_ms"] > 0 and measured["throughput"] > 0 and measured["memory_bytes"] > measured["bytes"]
        )
    assert found["models"]["student/0"]["parameters"] < found["models"]["teacher"]["parameters"]
    assert set(found["slices"]["ink"]) == {"bold", "faint"}
    assert sum(part["rows"] for part in found["slices"]["ink"].values()) == found["rows"]


def test_the_store_is_whole_and_the_arms_differ_only_in_soft_labels(job: tuple[Path, Path, str]) -> None:
    workdir = job[1]
    assert verify(Folder(str(workdir / "store")), Folder(str(workdir / "data"))) == []
    student, baseline = (read(workdir / arm / "0" / "history.json") for arm in ("student", "baseline"))
    assert [entry["step"] for entry in student] == [entry["step"] for entry in baseline]
    # The same start and the same first batch: the hard part of the first loss is equal to the last digit.
    assert student[0]["hard"] == baseline[0]["hard"]
    assert student[0]["soft"] > 0 and baseline[0]["soft"] == 0


def test_the_audit_is_whole_and_told(job: tuple[Path, Path, str]) -> None:
    _, workdir, printed = job
    found = read(workdir / "audit.json")
    student = found["ceiling"]["arms"]["student"]
    accuracies = [read(workdir / "evaluation.json")["models"][f"student/{seed}"]["accuracy"] for seed in (0, 1)]
    assert student["quality"]["value"] == pytest.approx(sum(accuracies) / 2)
    assert set(found["bias"]["columns"]["ink"]["groups"]) == {"bold", "faint"}
    assert [row["arm"] for row in found["gates"]] == ["baseline", "student"]
    stored = read(workdir / "store" / "negative.json")
    assert found["negative"]["train"] == stored and stored["positions"] == stored["positions_of"] > 0
    assert "the teacher is confidently wrong at" in printed and "calibration error: " in printed
    assert "2 seeds" in " ".join(found["ceiling"]["sentences"])


def test_totals_are_sums(job: tuple[Path, Path, str]) -> None:
    ledger = read(job[1] / "ledger.json")
    stages = {entry["stage"] for entry in ledger["entries"]}
    assert {"prepare", "teacher", "capture", "student/0", "baseline/1", "evaluate"} <= stages
    for what in ("wall_seconds", "core_seconds", "rows"):
        total = math.fsum(entry["usage"][what] for entry in ledger["entries"])
        assert ledger["totals"]["usage"][what] == pytest.approx(total)
    for what in ("usd", "kwh", "kg_co2e", "bytes"):
        total = math.fsum(entry[what] for entry in ledger["entries"])
        assert ledger["totals"][what] == pytest.approx(total) and total > 0
        if what != "bytes":
            by_node = math.fsum(part[what] for entry in ledger["entries"] for part in entry["parts"])
            apart = math.fsum(entry[what] for entry in ledger["entries"] if entry["kind"] == "storage")
            assert by_node + apart == pytest.approx(total)
    # What actors and ranks hold is known to be on a node; what the driver adds to it isn't.
    for entry in ledger["entries"]:
        if entry["stage"] in ("teacher", "capture", "student/0", "evaluate"):
            placed = math.fsum(part["hours"] for part in entry["parts"] if part["node"])
            assert placed > 0.8 * entry["usage"]["core_seconds"] / 3600, entry["stage"]


def test_the_plan_was_kept_and_the_alternatives_are_priced(job: tuple[Path, Path, str]) -> None:
    workdir = job[1]
    found = predicted_against_actual(Folder(str(workdir)))
    assert found is not None and all(stage["actual"] for stage in found["stages"].values())
    assert {"prepare", "teacher", "capture", "train", "evaluate"} == set(found["stages"])
    priced = read(workdir / "alternatives.json")
    assert priced["store_or_live"]["students"] == 2 and priced["distil_or_serve"]["teacher_request_usd"] > 0
    assert {curve["name"] for curve in priced["curves"]} == {"requests", "students", "months"}


def test_mlflow_holds_runs_costs_and_usable_models(job: tuple[Path, Path, str], digits: Path) -> None:
    uri = f"sqlite:///{job[1].parent / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("digits")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert {"digits", "teacher", "capture", "student/0", "student/1", "baseline/0", "evaluate", "audit"} <= set(runs)
    parent = runs["digits"]
    # A gap between slices is told where there are enough mistakes to judge it, which is luck in so small a job.
    assert {"quality/student_ece", "negative/heldout_rate"} <= set(runs["audit"].data.metrics)
    assert "negative/rate" in runs["capture"].data.metrics
    assert runs["capture"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.params["distill.temperature"] == "2.0"
    assert {"quality/student_accuracy", "quality/gain", "cost/usd", "store/bytes"} <= set(parent.data.metrics)
    assert all(run.info.status == "FINISHED" for run in runs.values())
    assert runs["student/0"].data.metrics["train/loss"] > 0
    artifacts = {each.path for each in client.list_artifacts(parent.info.run_id)}
    assert {"report.html", "audit.json", "ledger.json", "store"} <= artifacts
    [version] = client.search_model_versions(f"run_id = '{runs['student/0'].info.run_id}'")
    assert version.tags["distill.audit"] == parent.data.tags["distill.audit"]
    assert pipeline_of(read_run(uri, parent.info.run_id)).quality["student"]["low"] > 0.3
    ledger = read(job[1] / "ledger.json")
    for name in ("usd", "kwh", "kg_co2e"):
        if name != "kg_co2e":
            assert parent.data.metrics[f"cost/{name}"] == pytest.approx(ledger["totals"][name])
        for entry in ledger["entries"]:
            if entry["stage"] in runs:
                assert runs[entry["stage"]].data.metrics[f"cost/{name}"] == pytest.approx(entry[name])
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/digits-student/1")
    mlflow.set_tracking_uri(None)  # also takes it out of the environment, which other commands inherit
    rows: pd.DataFrame = pq.read_table(digits).to_pandas().head(40)
    predicted = model.predict(rows)
    assert (predicted["prediction"].astype(str) == rows["digit"].astype(str)).mean() > 0.5


def test_a_second_run_skips_everything_and_says_so(job: tuple[Path, Path, str], distill: Distill) -> None:
    spec, workdir, _ = job
    before = read(workdir / "student" / "0" / "stage.json")
    again = distill("run", spec)
    assert again.returncode == 0, again.stderr
    for stage in ("prepare", "teacher", "capture", "student/0", "baseline/1", "evaluate", "audit", "report"):
        assert any(line.startswith(stage) and "skipped" in line for line in again.stdout.splitlines()), again.stdout
    assert read(workdir / "student" / "0" / "stage.json") == before


@pytest.mark.slow
def test_another_temperature_redoes_the_students_alone(job: tuple[Path, Path, str], distill: Distill) -> None:
    spec, workdir, _ = job
    baseline, store = read(workdir / "baseline/0/stage.json"), read(workdir / "store/stage.json")
    again = distill("run", spec, "--set", "distill.temperature=4")
    assert again.returncode == 0, again.stderr
    assert "distill.temperature changed from 2.0 to 4.0" in again.stdout
    assert read(workdir / "baseline/0/stage.json") == baseline and read(workdir / "store/stage.json") == store


def test_inspect_and_verify(job: tuple[Path, Path, str], distill: Distill) -> None:
    store = job[1] / "store"
    told = distill("store", "inspect", store)
    assert told.returncode == 0 and "dense" in told.stdout
    assert distill("store", "verify", store).returncode == 0
    part = next((store / "parts").glob("*.arrow"))
    whole = part.read_bytes()
    try:
        part.write_bytes(whole[: len(whole) // 2] + b"\x55" + whole[len(whole) // 2 + 1 :])
        broken = distill("store", "verify", store)
        assert broken.returncode == 1 and part.name in broken.stdout and "Traceback" not in broken.stderr
    finally:
        part.write_bytes(whole)
