"""A sweep on a real Ray: side by side, ended early, failed, died, stopped and gone on with."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution

from cluster.errors import ClusterError, GangError
from cluster.files import Folder
from cluster.session import Session
from cluster.sweep import Book, Halving, Report, Sweep, Trial, run_sweep

SPACE = {"x": FloatDistribution(0.0, 10.0)}
# Whoever is as good as the others is never ended early, in whatever order they come.
GOOD = {"x": 1.0}
FIXED = {
    "whole": GOOD,
    "other": GOOD,
    "third": GOOD,
    "behind": {"x": 9.0},
    "spoilt": GOOD,
    "died": GOOD,
    "dies": GOOD,
}


class Stop(Exception):
    """Stands for a Ctrl-C."""


def bowl(argument: Any, name: str, parameters: dict[str, Any], report: Report) -> tuple[float, dict[str, Any]]:
    x, marks = parameters["x"], Path(argument)
    with (marks / name).open("a") as mark:
        mark.write(f"{os.getpid()}\n")
    for step in (1, 2, 3):
        report(step / 4, -((x - 2) ** 2) - 1 / step, {"step": step, "log": [{"seen": step}], "usage": {"rows": step}})
        if name == "spoilt":
            raise ValueError("no such x")
        if name == "dies" or (name == "died" and not (marks / "once").exists()):
            (marks / "once").touch()
            os._exit(1)
    if x == -4:
        raise GangError("nothing works")
    return -((x - 2) ** 2), {"step": 4, "log": [{"seen": 4}], "usage": {"rows": 4}}


def test_trials_end_in_all_the_ways_there_are(session: Session, tmp_path: Path) -> None:
    book, log = Book(Folder(str(tmp_path / "book"))), []
    sweep = Sweep({}, len(FIXED), points=FIXED, concurrent=2, halving=Halving(0.25, 2.0), retries=1)
    found = run_sweep(session, bowl, str(tmp_path), sweep, book, lambda _, new: log.extend(new), spoils=(ValueError,))
    trials = {trial.name: trial for trial in found}
    assert {name: trial.state for name, trial in trials.items()} == {
        "whole": "finished",
        "other": "finished",
        "third": "finished",
        "behind": "pruned",
        "spoilt": "failed",
        "died": "finished",
        "dies": "failed",
    }
    whole = trials["whole"]
    assert whole.score == -1.0 and whole.told == {"step": 4} and [look["step"] for look in whole.curve] == [1, 2, 3]
    assert [look["share"] for look in whole.curve] == [0.25, 0.5, 0.75] and log.count({"seen": 4}) == 4
    assert whole.usage["rows"] == 4 and whole.usage["wall_seconds"] > 0 and whole.usage["core_seconds"] > 0
    assert trials["spoilt"].why == "no such x" and "died" in str(trials["dies"].why)
    assert (tmp_path / "died").read_text().count("\n") == 2, "begun again once"
    assert sorted(book.trials(), key=lambda trial: trial.name) == found


def test_a_sweep_that_was_stopped_goes_on_where_it_was(session: Session, tmp_path: Path) -> None:
    book, ends = Book(Folder(str(tmp_path / "book"))), 0
    sweep = Sweep(SPACE, 6, prefix="try", points={"own": {"x": 5.0}}, concurrent=2, in_process=False)

    def stop(trial: Trial, _: Any) -> None:
        nonlocal ends
        ends += trial.state == "finished"
        if ends == 3:
            raise Stop

    with pytest.raises(Stop):
        run_sweep(session, bowl, str(tmp_path), sweep, book, stop)
    before = {trial.name: trial for trial in book.trials()}
    kept = {name for name, trial in before.items() if trial.state == "finished"}
    assert len(kept) >= 3
    began = time.time()
    found = run_sweep(session, bowl, str(tmp_path), sweep, book, lambda *_: None)
    assert [trial.name for trial in found] == ["own", *(f"try-{i:03d}" for i in range(5))]
    assert all(trial.state == "finished" for trial in found)
    for trial in found:
        if trial.name in before:
            assert trial.parameters == before[trial.name].parameters
        if trial.name in kept:
            assert trial == before[trial.name] and trial.ended < began
            assert (tmp_path / trial.name).read_text().count("\n") == 1
    again = run_sweep(session, bowl, str(tmp_path), sweep, book, lambda *_: None)
    assert again == found, "nothing is left to do"


def test_an_error_that_would_meet_all_trials_ends_the_sweep(session: Session, tmp_path: Path) -> None:
    book = Book(Folder(str(tmp_path / "book")))
    sweep = Sweep({}, 2, points={"a": {"x": -4.0}, "b": {"x": 1.0}})
    with pytest.raises(GangError, match="nothing works"):
        run_sweep(session, bowl, str(tmp_path), sweep, book, lambda *_: None)
    assert [trial.state for trial in book.trials() if trial.name == "a"] == ["begun"]
    unforeseen = Sweep({}, 1, points={"c": {"y": 1.0}})
    with pytest.raises(ClusterError, match="KeyError: 'x'"):
        run_sweep(session, bowl, str(tmp_path), unforeseen, Book(Folder(str(tmp_path / "two"))), lambda *_: None)
