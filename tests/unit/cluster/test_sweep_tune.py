"""What the searcher and the early stopping make of a book: no Ray is started."""

import math
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from cluster.files import Folder
from cluster.sweep import Book, Halving, Sweep, Trial, _Desk
from cluster.sweep_book import Event
from cluster.sweep_tune import Asha, Search

SPACE = {"x": FloatDistribution(0.0, 10.0)}


def ended(name: str, x: float, scores: list[float], state: str = "finished") -> Trial:
    curve = [{"share": (i + 1) / 8, "score": score} for i, score in enumerate(scores)]
    return Trial(name, {"x": x}, state, scores[-1] if state == "finished" else None, curve)  # type: ignore[arg-type]


def look(share: float, score: float, final: bool = False) -> dict[str, Any]:
    return {"share": share, "score": score, "final": final}


class Asked:
    def __init__(self, name: str) -> None:
        self.trial_id = name


def test_a_book_is_read_back_and_damage_is_left_out(tmp_path: Path) -> None:
    book = Book(Folder(str(tmp_path)))
    trial = ended("trial-003", 1.5, [0.1, 0.2])
    book.write(trial)
    (tmp_path / "trial-004.json").write_text("{")
    (tmp_path / "trial-005.json").write_text('{"unknown": 1}')
    assert book.trials() == [trial]


def test_the_search_knows_the_book_and_runs_again_what_was_cut_off() -> None:
    known = [
        ended("trial-000", 2.0, [0.5, 0.6]),
        ended("trial-001", 9.0, [0.1, 0.2], "pruned"),
        ended("own", 20.0, [0.3]),  # outside the space
        Trial("trial-002", {"x": 4.0}),
    ]
    search = Search(Sweep(SPACE, 8, points={"own": {"x": 20.0}, "other": {"x": 3.0}}), known, "max")
    states = [trial.state for trial in search._ot_study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED]
    assert search._ot_study.trials[1].intermediate_values == {125: 0.1, 250: 0.2}
    first, second = search.suggest("a"), search.suggest("b")
    assert first == {"name": "trial-002", "parameters": {"x": 4.0}}
    assert second == {"name": "other", "parameters": {"x": 3.0}}
    third = search.suggest("c")
    assert third is not None and third["name"] == "trial-003" and 0 <= third["parameters"]["x"] <= 10


def test_what_is_ended_early_is_told_as_pruned_not_as_its_last_score() -> None:
    search = Search(Sweep(SPACE, 8), [], "max")
    for name in "abc":
        search.suggest(name)
    search.on_trial_result("a", look(0.125, 0.1))
    search.on_trial_complete("a", look(0.25, 0.2))
    search.on_trial_result("b", look(0.5, 0.1))
    search.on_trial_complete("b", look(1.0, 0.9, final=True))
    search.on_trial_complete("c", look(1.0, math.nan, final=True))
    early, whole, failed = search._ot_study.trials
    assert early.state == TrialState.PRUNED and early.intermediate_values == {125: 0.1, 250: 0.2}
    assert whole.state == TrialState.COMPLETE and whole.value == 0.9
    assert failed.state == TrialState.FAIL


def test_a_search_that_goes_on_does_not_repeat_its_random_start() -> None:
    def proposals(known: list[Trial]) -> list[float]:
        search = Search(Sweep(SPACE, 8), known, "max")
        return [(search.suggest(str(i)) or {})["parameters"]["x"] for i in range(3)]

    assert proposals([]) == proposals([])
    assert not set(proposals([])) & set(proposals([ended("trial-000", 2.0, [0.5])]))


def judged(known: list[Trial], score: float, share: float = 0.25, mode: Any = "max") -> str:
    asha = Asha(Halving(0.25, 3.0), known, mode)
    trial = Asked("new")
    asha.on_trial_add(None, trial)
    return str(asha.on_trial_result(None, trial, look(share, score)))


def test_whoever_falls_behind_others_of_the_book_at_the_same_share_is_ended() -> None:
    known = [ended(f"trial-{i:03d}", i, [0.0, 0.1 * i] + [0.5] * 6) for i in range(6)]
    assert judged(known, 0.2) == "STOP" and judged(known, 0.45) == "CONTINUE"
    assert judged(known, 0.2, mode="min") == "STOP" and judged(known, 0.05, mode="min") == "CONTINUE"
    assert judged(known, 0.2, share=0.125) == "CONTINUE", "nobody is judged within the grace period"


def test_nobody_is_judged_by_fewer_than_reduction_trials() -> None:
    known = [ended(f"trial-{i:03d}", i, [0.5, 0.5]) for i in range(2)]
    assert judged(known, 0.1) == "CONTINUE"
    assert judged([*known, ended("trial-002", 2, [0.5, 0.5])], 0.1) == "STOP"


def test_the_end_of_a_trial_is_no_look() -> None:
    known = [ended(f"trial-{i:03d}", i, [0.9] * 8) for i in range(6)]
    asha, trial = Asha(Halving(), known, "max"), Asked("new")
    asha.on_trial_add(None, trial)
    assert asha.on_trial_result(None, trial, look(1.0, 0.0, final=True)) == "CONTINUE"


def test_a_trial_that_goes_on_has_worked_through_its_rows_once(tmp_path: Path) -> None:
    book = Book(Folder(str(tmp_path)))

    def attempt(rows: int, final: bool) -> None:
        desk = _Desk(Sweep({}, 1), {trial.name: trial for trial in book.trials()}, book, lambda *_: None)
        desk.take(Event("begun", "a", {}), False)
        usage = {"rows": rows, "cpu_seconds": 1.0}
        told = {**look(0.5, 0.5, final), "done": final, "told": {}, "usage": usage, "log": []}
        desk.take(Event("look", "a", {}, told), False)

    attempt(50, final=False)
    attempt(100, final=True)
    [trial] = book.trials()
    assert trial.state == "finished" and (trial.usage["rows"], trial.usage["cpu_seconds"]) == (100, 2.0)
