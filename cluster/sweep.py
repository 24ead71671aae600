"""Search for good settings with Ray Tune: Optuna proposes, ASHA ends early what falls behind, a book keeps all of it.

Trials run side by side, as many as the cluster has room for, in processes that are used again and again. A sweep may
be killed at any moment and called again with the same book: ended trials are kept, and teach both the search and the
early stopping as if they had just run; those cut off are run again under the same name.
"""

import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster.errors import ClusterError, one_line
from cluster.meter import Usage
from cluster.session import Session
from cluster.sweep_book import Book, Event, Trial

__all__ = ["Book", "Halving", "Report", "Sweep", "Trial", "run_sweep", "within"]

_QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "10",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_POLL_SECONDS, _END_SECONDS = 0.2, 30.0
_DIED = "its process died again and again: it was killed or ran out of memory"

Errors = tuple[type[Exception], ...]
Report = Callable[[float, float, dict[str, Any]], None]
"""``report(done, score, told)``: how much of the trial's own training is done, a share, and how good it is by now.
Of what is told, ``usage`` (counts for the meter) and ``log`` (a list for ``on_change``) do not stay in the book. It may
not return: then the trial has been ended early."""
OnChange = Callable[[Trial, list[dict[str, Any]]], None]
"""Called with a trial that has begun, was looked at or has ended, and what it has logged since the last time."""
Run = Callable[[Any, str, dict[str, Any], Report], tuple[float, dict[str, Any]]]
"""``run(argument, name, parameters, report)`` is one trial, in a process of Ray's; gives its score and what to keep."""


@dataclass(frozen=True)
class Halving:
    """When a trial is ended early (asynchronous successive halving, Li et al. 2020).

    Trials meet at the shares ``grace``, ``grace``·``reduction``, ``grace``·``reduction``², … of their own training.
    Whoever is not among the best 1/``reduction`` of all that have come by there ends. Shares, not steps: so a trial of
    fewer steps is compared at the same point of its learning-rate schedule.
    """

    grace: float = 0.25
    reduction: float = 3.0


@dataclass(frozen=True)
class Sweep:
    """What is searched, and how.

    Attributes:
        space: Optuna's distributions by parameter; without any only ``points`` are tried.
        trials: how many to try in all, ``points`` and those in the book counted.
        better: whether a higher or a lower score is.
        prefix: what searched trials are called, with a number behind it.
        points: to be tried before all others, by name; they may lie outside the space.
        cpus, gpus: what each trial holds in all.
        in_process: whether its process holds that; else a gang does that the trial starts beside it.
        concurrent: the most trials at a time.
        seed: of the search.
        halving: without it each trial runs to its end.
        retries: how often a trial whose process died is begun again.
    """

    space: Mapping[str, Any]
    trials: int
    better: Literal["higher", "lower"] = "higher"
    prefix: str = "trial"
    points: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    cpus: float = 1.0
    gpus: float = 0.0
    in_process: bool = True
    concurrent: int = 1
    seed: int = 0
    halving: Halving | None = None
    retries: int = 2


def run_sweep(
    session: Session,
    run: Run,
    argument: Any,
    sweep: Sweep,
    book: Book,
    on_change: OnChange,
    *,
    spoils: Errors = (),
    fatal: Errors = (),
    what: str = "tuning",
) -> list[Trial]:
    """Try what is left to try; ``on_change`` is called here whenever a trial has begun, was looked at, or has ended.

    Args:
        spoils: errors that make a trial a failed one; any other ends the sweep.
        fatal: the caller's own errors that are raised here as the trial raised them.

    Returns:
        All trials of the sweep, by name, those that were in the book already too.

    Raises:
        ResourceError: the cluster has no room for one trial.
        ClusterError, or one of ``fatal``: as a trial raised it.
    """
    # Only now, as Ray Tune takes seconds to import.
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if sweep.in_process:  # a gang asks for itself
        session.require({what: [(1, {"CPU": sweep.cpus, "GPU": sweep.gpus})]})
    # Where nothing is searched, what the book holds besides the points is of no concern.
    known = {trial.name: trial for trial in book.trials() if sweep.space or trial.name in sweep.points}
    if _ended(known.values()) < sweep.trials:
        from cluster.sweep_tune import trial_function

        tuning = _Tuning(trial_function(run, argument, spoils, fatal), sweep, list(known.values()))
        _follow(tuning, sweep, known, book, on_change)
        if tuning.error is not None:
            raise ClusterError(f"{what} failed: {one_line(tuning.error)}") from None
        if (undone := sweep.trials - _ended(known.values())) > 0:
            raise ClusterError(f"{what} ended with {undone} of {sweep.trials} trials undone; run it again to go on")
    return [known[name] for name in sorted(known)]


class _Tuning(threading.Thread):
    """Ray Tune's blocking ``fit`` in a thread of its own: the caller's keeps its signal handlers."""

    def __init__(self, trial: Callable[[dict[str, Any]], None], sweep: Sweep, known: list[Trial]) -> None:
        super().__init__(daemon=True, name="sweep")
        self.trial, self.sweep, self.known = trial, sweep, known
        self.events: queue.Queue[Event] = queue.Queue()
        self.stopping = threading.Event()
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self._fit()
        except Exception as error:
            self.error = error

    def _fit(self) -> None:
        from ray import tune

        from cluster.sweep_tune import Asha, Ears, Halt, Search

        sweep = self.sweep
        mode: Literal["max", "min"] = "max" if sweep.better == "higher" else "min"
        left = sweep.trials - _ended(self.known)
        held = {"CPU": sweep.cpus} | ({"GPU": sweep.gpus} if sweep.gpus else {})
        if not sweep.in_process:
            held = {"CPU": 0.001}  # Ray Tune refuses a trial that holds nothing
        with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
            tuner = tune.Tuner(
                tune.with_resources(self.trial, held),
                tune_config=tune.TuneConfig(
                    num_samples=left,
                    search_alg=Search(sweep, self.known, mode),
                    scheduler=Asha(sweep.halving, self.known, mode) if sweep.halving else None,
                    max_concurrent_trials=min(left, sweep.concurrent),
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="sweep",
                    storage_path=folder,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=sweep.retries),
                    stop=Halt(self.stopping),
                    callbacks=[Ears(self.events)],
                ),
            )
            tuner.fit()


class _Desk:
    """Turns what is heard into entries of the book."""

    def __init__(self, sweep: Sweep, known: dict[str, Trial], book: Book, on_change: OnChange) -> None:
        self.sweep, self.known, self.book, self.on_change = sweep, known, book, on_change
        self._since: dict[str, float] = {}
        self._before: dict[str, Usage] = {}

    def take(self, event: Event, stopping: bool) -> None:
        """Enter one event.

        Raises:
            Exception: what a trial raised that ends the sweep.
        """
        trial = self.known.get(event.name)
        if event.kind == "begun" or trial is None:
            trial = self._begin(event, trial)
        self._count(trial, event)
        if event.kind == "died":
            trial.state, trial.score, trial.why = "failed", None, _DIED
        elif event.kind == "look":
            self._look(trial, event.result, stopping)
        trial.ended = time.time()
        self.book.write(trial)
        self.on_change(trial, event.result.get("log", []))
        if (error := event.result.get("raised")) is not None:
            raise error

    def _begin(self, event: Event, before: Trial | None) -> Trial:
        usage, curve = (before.usage, [*before.curve]) if before is not None else ({}, [])
        # It may go on from where it was cut off, and is then not looked at again before that.
        trial = Trial(event.name, event.parameters, curve=curve, usage=usage, started=time.time())
        self.known[event.name] = trial
        # A trial tells what of its input it is through by now, in whichever attempt; all else adds up over attempts.
        held = replace(Usage.of(usage), rows=0, tokens=0)
        self._since[event.name], self._before[event.name] = time.perf_counter(), held
        return trial

    def _count(self, trial: Trial, event: Event) -> None:
        wall = time.perf_counter() - self._since[trial.name]
        told = event.result.get("usage", {})
        spent = {
            **told,
            "wall_seconds": wall,
            "core_seconds": wall * self.sweep.cpus,
            "device_seconds": wall * self.sweep.gpus,
        }
        trial.usage = (self._before[trial.name] + Usage.of(spent)).as_dict()

    def _look(self, trial: Trial, result: dict[str, Any], stopping: bool) -> None:
        if result.get("why") is not None:
            trial.state, trial.why, trial.score = "failed", result["why"], None
            return
        if result.get("raised") is not None:
            return
        trial.score = result["score"]
        if result["final"]:
            trial.state, trial.told = "finished", result["told"]
        else:
            earlier = [look for look in trial.curve if look["share"] < result["share"]]
            trial.curve = [*earlier, {"share": result["share"], "score": result["score"], **result["told"]}]
            if result["done"] and not stopping:
                trial.state = "pruned"


def _follow(tuning: _Tuning, sweep: Sweep, known: dict[str, Trial], book: Book, on_change: OnChange) -> None:
    """Enter what is heard until Ray Tune has ended; whatever interrupts this ends the trials, too."""
    desk = _Desk(sweep, known, book, on_change)

    def drain() -> None:
        while True:
            try:
                event = tuning.events.get(timeout=_POLL_SECONDS if tuning.is_alive() else 0.0)
            except queue.Empty:
                return
            desk.take(event, tuning.stopping.is_set())

    try:
        while tuning.is_alive():
            drain()
        drain()
    except BaseException:
        tuning.stopping.set()
        tuning.join(_END_SECONDS)
        raise


def within(parameters: Mapping[str, Any], space: Mapping[str, Any]) -> bool:
    """Whether parameters are what Optuna could propose: all those of the ``space`` and no others, each inside it."""
    if parameters.keys() != space.keys():
        return False
    try:
        return all(d._contains(d.to_internal_repr(parameters[name])) for name, d in space.items())
    except (TypeError, ValueError):  # what Optuna says of a value of another kind
        return False


def _ended(trials: Iterable[Trial]) -> int:
    return sum(trial.state != "begun" for trial in trials)
