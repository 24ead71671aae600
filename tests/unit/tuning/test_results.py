"""What tuning leaves for the run after it."""

from pathlib import Path
from typing import Any

from tuning_cases import job

from cluster.files import Folder
from distill_jobs.spec.tune import SEARCH, Tune, Values
from distill_jobs.tuning.results import Outcome, Round
from distill_jobs.tuning.space import Space, baseline_space, student_space

T, ALPHA, RATE = "distill.temperature", "distill.alpha", "student.train.learning_rate"


def found(space: Space, **best: Any) -> Round:
    parameters = {path.replace("__", "."): value for path, value in best.items()}
    return Round(space, judged={"best": "best", "finalists": [{"name": "best", "parameters": parameters}]})


def test_the_best_job_has_what_was_found_for_each_role(tmp_path: Path) -> None:
    small = job(tmp_path)
    space = student_space(small, SEARCH)
    student = found(space, distill__temperature=3.0, distill__alpha=0.4, student__train__learning_rate=0.007)
    # As the baseline is searched: in a job with what both share.
    beside = baseline_space(space.apply({T: 3.0, ALPHA: 0.4}), SEARCH)
    baseline = found(beside, student__train__learning_rate=0.005)

    def best(other: Round | None) -> Any:
        return Outcome(small, Tune(), "accuracy", "higher", 1, student, other, 1.0, 10, 40, None).best

    made = best(baseline)
    assert (made.distill.temperature, made.distill.alpha) == (3.0, 0.4)
    assert (made.student.train.learning_rate, made.baseline_train.learning_rate) == (0.007, 0.005)
    assert made.has(student.best_settings, "student") and made.has(baseline.best_settings, "baseline")
    alone = best(None)
    assert alone.has(student.best_settings, "student") and alone.baseline is None


def test_a_job_is_known_to_have_a_part_that_was_chosen_and_a_surface_takes_no_schedule(tmp_path: Path) -> None:
    search = {
        "distill.loss": Values(choice=("forward_kl", {"jensen_shannon": {"beta": 0.3}})),
        T: Values(uniform=(1.0, 8.0)),
        ALPHA: Values(uniform=(0.0, 1.0)),
    }
    moving = {"temperature": {"schedule": "linear", "from": 4.0, "to": 1.0}, "alpha": 0.9}
    small = job(tmp_path, distill=moving)
    space = student_space(small, search)
    for parameters in (
        space.parameters(),
        {**space.parameters(), "distill.loss": space.distributions()["distill.loss"].choices[1]},
    ):
        settings = space.settings(parameters)
        assert space.apply(settings).has(settings, "student")
    own = Round(space, judged={"best": "default", "finalists": [{"name": "default", "parameters": space.parameters()}]})
    outcome = Outcome(small, Tune(), "accuracy", "higher", 1, own, None, 1.0, 10, 40, None)
    outcome.write(Folder(str(tmp_path / "tune")), lambda _: 0.0)
    assert Folder(str(tmp_path / "tune")).read_json("surface.json")["chosen"] is None
