"""What ``distill tune`` leaves in ``tune/``, for the report and for whoever goes on from there.

``trials.json``::

    schema_version  1
    task, metric    metric: accuracy or nll, of the validation split; better: higher or lower
    split           {"name": "validation", "rows": n}: tuning never saw the test split
    search          by dotted path the range or the choices, as in the spec
    seed            the training seed of every trial of the search; the finalists have the job's seeds
    trials          name, role (student or baseline), round (search or finalists), state (finished, pruned: ended
                    early; failed: why), settings by dotted path, score (null where failed; of a pruned trial the last
                    look's), curve: [{step, share, score, loss}], step (whose model the score is of), usage, usd,
                    seconds, started, ended
    student         finalists: [{name, settings, scores by seed, mean: interval}], best and default: names of finalists,
                    gain: best's mean minus the default's, as an interval, distinguishable, noise: the standard
                    deviation of one score over seeds, settings: the best's
    baseline        the same; null where it was not tuned
    saved           see ``savings``: against_capture_each, against_live, each an estimate; trainings, capture_usd
    usd, usage      of the whole sweep; seconds: the time it took

``importance.json``: by role what ``importance`` gives; ``surface.json``: what ``surface`` gives, with ``metric``,
``better`` and ``chosen`` (T and alpha of the best settings); ``surface.png``: its picture, where there is a surface;
``best.yaml``: the job with the best settings, which ``distill run`` takes as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from cluster.files import Folder
from cluster.meter import Usage
from cluster.sweep import Trial
from distill_jobs.spec import Job
from distill_jobs.spec.tune import Tune
from distill_jobs.tuning.importance import importance
from distill_jobs.tuning.picture import picture
from distill_jobs.tuning.savings import savings
from distill_jobs.tuning.space import Space, baseline_space
from distill_jobs.tuning.surface import ALPHA, T, is_point, surface
from distill_jobs.tuning.trial import SEED

FOLDER, TRIALS, IMPORTANCE, BEST = "tune", "trials.json", "importance.json", "best.yaml"
SURFACE, PICTURE = "surface.json", "surface.png"

Price = Callable[[Usage], float]
"""What a usage costs, in US dollars."""


@dataclass
class Round:
    """The trials of one role, searched and last ones, and what was judged of them."""

    space: Space
    searched: list[Trial] = field(default_factory=list)
    last: list[Trial] = field(default_factory=list)
    judged: dict[str, Any] = field(default_factory=dict)

    @property
    def best_parameters(self) -> dict[str, Any]:
        """Of the best finalist, as Optuna proposed them; the spec's own where none came to its end."""
        best = self.judged.get("best") or self.judged.get("default")
        return next((dict(f["parameters"]) for f in self.judged.get("finalists", []) if f["name"] == best), {})

    @property
    def best_settings(self) -> dict[str, Any]:
        return self.space.settings(self.best_parameters)

    def summary(self) -> dict[str, Any]:
        """What was judged, in the spec's terms."""
        own = [
            {**{k: v for k, v in f.items() if k != "parameters"}, "settings": self.space.settings(f["parameters"])}
            for f in self.judged["finalists"]
        ]
        return {**self.judged, "finalists": own, "settings": self.best_settings}

    def trials(self, price: Price) -> list[dict[str, Any]]:
        """Each trial as ``trials.json`` holds it."""
        return [
            _told(trial, self.space, name, price)
            for name, trials in (("search", self.searched), ("finalists", self.last))
            for trial in trials
        ]


@dataclass(frozen=True)
class Outcome:
    """All that came of tuning, to be written.

    Attributes:
        seed: of the search's trials.
        seconds: that the sweep took, over all calls.
        validation_rows, store_rows: of the split that scored the trials, and of the store that they trained from.
        capture_usd: what the capture cost, where the ledger knows.
    """

    job: Job
    spec: Tune
    metric: str
    better: str
    seed: int
    student: Round
    baseline: Round | None
    seconds: float
    validation_rows: int
    store_rows: int
    capture_usd: float | None

    @property
    def rounds(self) -> list[Round]:
        return [self.student] + ([self.baseline] if self.baseline is not None else [])

    @property
    def trials(self) -> list[Trial]:
        return [trial for each in self.rounds for trial in each.searched + each.last]

    @property
    def usage(self) -> Usage:
        return used(self.trials, self.seconds)

    @property
    def best(self) -> Job:
        """The job with the best settings of the student, and the baseline's own."""
        best = self.student.space.apply(self.student.best_settings)
        if self.baseline is not None:
            # The job that the baseline was searched in has of the student only what both share.
            best = baseline_space(best, self.spec.search).apply(self.baseline.best_settings)
        own = best.distill.gate.of(best.task)
        others = tuple(gate for gate in self.job.audit.gates if gate.of(best.task) != own)
        return best.model_copy(update={"audit": best.audit.model_copy(update={"gates": others})})

    def write(self, folder: Folder, price: Price) -> None:
        """Write all files into ``folder``."""
        folder.write_json(TRIALS, self._trials(price))
        seed = self.spec.seed
        shares = {each.space.role: importance(each.searched, each.space.distributions(), seed) for each in self.rounds}
        folder.write_json(IMPORTANCE, shares)
        self._write_surface(folder)
        head = (
            f"# Chosen by `distill tune` by {self.metric} on the validation split; `distill run` trains and tests it.\n"
        )
        text = yaml.safe_dump(self.best.model_dump(mode="json", exclude_none=True), sort_keys=False)
        folder.write(BEST, (head + text).encode())

    def _trials(self, price: Price) -> dict[str, Any]:
        usage = self.usage
        return {
            "schema_version": 1,
            "task": self.job.task,
            "metric": self.metric,
            "better": self.better,
            "split": {"name": "validation", "rows": self.validation_rows},
            "search": {path: v.model_dump(mode="json", exclude_none=True) for path, v in self.spec.search.items()},
            SEED: self.seed,
            "trials": [trial for each in self.rounds for trial in each.trials(price)],
            "student": self.student.summary(),
            "baseline": self.baseline.summary() if self.baseline is not None else None,
            "saved": savings(self.capture_usd, self.store_rows, self.student.searched + self.student.last),
            "usage": usage.as_dict(),
            "usd": price(usage),
            "seconds": self.seconds,
        }

    def _write_surface(self, folder: Folder) -> None:
        student, own = self.student, self.student.best_settings
        found = surface(student.searched, student.space.distributions(), student.best_parameters, self.spec.seed)
        # The spec's own may be schedules, which lie nowhere on the surface.
        chosen = (own[T], own[ALPHA]) if is_point(own) else None
        at = student.space.settings(found["at"])
        folder.write_json(SURFACE, {**found, "at": at, "metric": self.metric, "better": self.better, "chosen": chosen})
        if found["why"] is None:
            folder.write(PICTURE, picture(found, self.metric, chosen))
        else:
            folder.remove(PICTURE)


def used(trials: Sequence[Trial], seconds: float) -> Usage:
    """What all trials held, their processes' start-ups included; they ran side by side in ``seconds``."""
    total = sum((Usage.of(trial.usage) for trial in trials), Usage())
    return Usage.of({**total.as_dict(), "wall_seconds": seconds})


def _told(trial: Trial, space: Space, which: str, price: Price) -> dict[str, Any]:
    usage = Usage.of(trial.usage)
    own = {path: value for path, value in trial.parameters.items() if path != SEED}
    return {
        "name": trial.name,
        "role": space.role,
        "round": which,
        "state": trial.state,
        "why": trial.why,
        "settings": space.settings(own) | ({SEED: trial.parameters[SEED]} if SEED in trial.parameters else {}),
        "score": trial.score,
        "curve": trial.curve,
        "step": trial.told.get("step"),
        "usage": usage.as_dict(),
        "usd": price(usage),
        "seconds": usage.wall_seconds,
        "started": trial.started,
        "ended": trial.ended,
    }
