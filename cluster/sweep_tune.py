"""What a sweep puts into Ray Tune: the searcher, the scheduler, the end, and the function that is a trial."""

import itertools
import math
import queue
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import optuna
import ray.tune
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from cluster.errors import ClusterError, GangError, one_line
from cluster.meter import Meter
from cluster.sweep import Errors, Halving, Run, Sweep, within
from cluster.sweep_book import Event, Trial

Mode = Literal["max", "min"]
Values = dict[str, Any]


def trial_function(run: Run, argument: Any, spoils: Errors, fatal: Errors) -> Callable[[Values], None]:
    """What Ray Tune calls in a trial's process: errors are told as values, so that their types survive.

    Only a process that dies is an error to Ray Tune, which begins that trial again.
    """

    def trial(config: Values) -> None:
        with Meter() as meter:

            def tell(share: float, score: float, told: Values, **more: Any) -> None:
                usage, log = meter.read().as_dict() | told.pop("usage", {}), told.pop("log", [])
                look = {"share": share, "score": score, "told": told, "usage": usage, "log": log, "final": False}
                ray.tune.report({**look, **more})

            try:
                score, told = run(argument, config["name"], config["parameters"], tell)
                tell(1.0, score, told, final=True)
            except spoils as error:
                tell(1.0, math.nan, {}, final=True, why=str(error))
            except Exception as error:
                known = isinstance(error, (*fatal, ClusterError))
                tell(1.0, math.nan, {}, final=True, raised=error if known else GangError(one_line(error)))

    return trial


class Search(OptunaSearch):  # type: ignore[misc]  # Ray is untyped
    """Optuna's proposals, after the points that are to be tried first; each trial gets a name.

    What was ended early counts for Optuna as pruned at the share of its training that it came to. Ray's own class
    tells the score of that moment as if the trial had ended with it.
    """

    def __init__(self, sweep: Sweep, known: Sequence[Trial], mode: Mode) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Another seed after another start, or the random part of the search would propose again what it did before.
        sampler = optuna.samplers.TPESampler(seed=sweep.seed + 1_000_003 * len(known))
        super().__init__(dict(sweep.space) or None, metric="score", mode=mode, sampler=sampler)
        self.sweep = sweep
        ended = {trial.name for trial in known if trial.state != "begun"}
        again = {trial.name: trial.parameters for trial in known if trial.state == "begun"}
        points = {**again, **sweep.points}
        self._points = [(name, points[name]) for name in points if name not in ended]
        self._names = {trial.name for trial in known} | set(sweep.points)
        self._given: dict[str, Values] = {}
        self._curves: dict[str, dict[int, float]] = {}
        for trial in known:
            if trial.state != "begun":
                curve = {_thousandths(look): look["score"] for look in trial.curve}
                score = trial.score if trial.state == "finished" else None
                self._remember(trial.parameters, curve, math.nan if score is None else score)

    def suggest(self, trial_id: str) -> Values | None:
        """Ray's question for the next trial."""
        self._curves[trial_id] = {}
        if self._points:
            name, parameters = self._points.pop(0)
            self._given[trial_id] = parameters
        elif self._space:
            name, parameters = self._new_name(), dict(super().suggest(trial_id))
        else:
            return None
        return {"name": name, "parameters": parameters}

    def on_trial_result(self, trial_id: str, result: Values) -> None:
        """Ray's word of a look."""
        if not result["final"]:
            self._curves[trial_id][_thousandths(result)] = result["score"]

    def on_trial_complete(self, trial_id: str, result: Values | None = None, error: bool = False) -> None:
        """Ray's word of an end; without a result the process died."""
        ended = result is not None and not error
        if ended and not result["final"]:  # type: ignore[index]  # the look at which it was ended early
            self.on_trial_result(trial_id, result)  # type: ignore[arg-type]
        curve = self._curves.pop(trial_id)
        score = result["score"] if ended and result["final"] else math.nan  # type: ignore[index]
        parameters = self._given.pop(trial_id, None)
        if parameters is not None:
            self._remember(parameters, curve, score)
            return
        asked = self._ot_trials[trial_id]
        for step, value in curve.items():
            asked.report(value, step)
        state = _state(curve, score)
        self._ot_study.tell(asked, score if state == _STATES.COMPLETE else None, state=state)

    def _remember(self, parameters: Values, curve: dict[int, float], score: float) -> None:
        """Let Optuna know of a trial that it has not asked for, where it lies in the space that is searched."""
        if not self._space or not within(parameters, self._space):
            return
        state = _state(curve, score)
        found = optuna.trial.create_trial(
            state=state,
            value=score if state == _STATES.COMPLETE else None,
            params=parameters,
            distributions=dict(self._space),
            intermediate_values=curve,
        )
        self._ot_study.add_trial(found)

    def _new_name(self) -> str:
        number = next(n for n in itertools.count() if self._name(n) not in self._names)
        self._names.add(self._name(number))
        return self._name(number)

    def _name(self, number: int) -> str:
        return f"{self.sweep.prefix}-{number:03d}"


class Asha(AsyncHyperBandScheduler):  # type: ignore[misc]
    """Ray's asynchronous successive halving, which remembers the trials of the book, and judges nobody by fewer than
    ``reduction`` trials: Ray's ends the second trial already when it is behind the first."""

    def __init__(self, halving: Halving, known: Sequence[Trial], mode: Mode) -> None:
        super().__init__(
            time_attr="share",
            metric="score",
            mode=mode,
            max_t=1.0,
            grace_period=halving.grace,
            reduction_factor=halving.reduction,
        )
        [bracket] = self._brackets
        of_many, least = bracket.cutoff, math.ceil(halving.reduction)
        bracket.cutoff = lambda recorded: of_many(recorded) if len(recorded) >= least else None
        for trial in known:
            if trial.state != "begun":
                for look in trial.curve:
                    bracket.on_result(
                        SimpleNamespace(trial_id=trial.name), look["share"], self._metric_op * look["score"]
                    )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Values) -> str:
        """Ray's question after a look; whoever has come to the end has nothing more to fear."""
        if result["final"]:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Values) -> None:  # noqa: ARG002
        """Ray's word of an end, which is no look."""
        self._trial_info.pop(trial.trial_id, None)


class Halt(ray.tune.Stopper):  # type: ignore[misc]
    """Ends all trials once the caller says so."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping

    def __call__(self, trial_id: str, result: Values) -> bool:  # noqa: ARG002
        return self._stopping.is_set()

    def stop_all(self) -> bool:
        return self._stopping.is_set()

    # Ray copies stoppers into its snapshots, and a lock can't be copied.
    def __getstate__(self) -> Values:
        return {}


class Ears(ray.tune.Callback):  # type: ignore[misc]
    """Passes on what Ray Tune says of its trials, in its own thread."""

    def __init__(self, events: queue.Queue[Event]) -> None:
        self._events = events

    def on_trial_start(self, trial: Any, **info: Any) -> None:  # noqa: ARG002  # Ray names them
        self._tell("begun", trial, {})

    def on_trial_result(self, trial: Any, result: Values, **info: Any) -> None:  # noqa: ARG002
        self._tell("look", trial, dict(result))

    def on_trial_error(self, trial: Any, **info: Any) -> None:  # noqa: ARG002
        self._tell("died", trial, {})

    def _tell(self, kind: Literal["begun", "look", "died"], trial: Any, result: Values) -> None:
        self._events.put(Event(kind, trial.config["name"], trial.config["parameters"], result))

    def __getstate__(self) -> Values:
        return {}


_STATES = optuna.trial.TrialState


def _thousandths(look: Values) -> int:
    return round(float(look["share"]) * 1000)


def _state(curve: dict[int, float], score: float) -> optuna.trial.TrialState:
    if math.isfinite(score):
        return _STATES.COMPLETE
    return _STATES.PRUNED if curve else _STATES.FAIL
