"""What it costs the work to be watched: the status file, the metrics and the log lines, as shares of the work's own
processor time, with and without, in turn. Processor time counts the threads that do it, and not what else runs here."""

import logging
import statistics
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from cluster import logs
from cluster.files import Folder
from cluster.metrics import Publisher
from cluster.session import Session
from cluster.standing import STANDING
from distill_jobs import live
from distill_jobs.live import Live, show_training
from distill_jobs.progress import Progress

pytestmark = pytest.mark.benchmark

ROUNDS, STEPS, FASTER = 15, 60, 20
VALUES = {"loss": 1.0, "step_seconds": 0.1, "tokens_per_second": 50.0, "waiting": 0.01}
# A training logs at most a hundred times, a map tells once a second: more often than either.
FLOOR_WATCHED, FLOOR_STEP, FLOOR_SHARD, FLOOR_PUBLISH = 0.01, 0.002, 0.001, 0.01


def work() -> None:
    """A few milliseconds of it."""
    left = np.ones((260, 260), dtype=np.float32)
    for _ in range(4):
        left = left @ left * 1e-3


def cpu(call: Callable[[], object], times: int = 1) -> float:
    before = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - before) / times


def test_a_watched_job_takes_hardly_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_EVERY_SECONDS", 5.0 / FASTER)
    monkeypatch.setattr(live, "_WRITING_SHARE", 1.0)
    ratios, steps = [], []
    progress = Progress("train")

    def watched() -> None:
        work()
        progress.advance(progress.done + 1, 1e9, "")
        show_training("student/0", int(progress.done), VALUES, None)

    cpu(work, STEPS)
    for _ in range(ROUNDS):
        alone = cpu(work, STEPS)
        with Live("bench", Folder(str(tmp_path)), lambda: 1.0) as telling:
            telling.follow(progress)
            ratios.append(cpu(watched, STEPS) / alone)
        steps.append(alone)
    ratio, step = statistics.median(ratios), statistics.median(steps)
    share = (ratio - 1.0) / FASTER
    print(f"\nsteps of {1e3 * step:.1f} ms, the file renewed {FASTER} times as often: {ratio:.3f} x, so {share:.2%}")
    assert share < FLOOR_WATCHED


def test_a_step_and_a_shard_cost_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress("train")
    told = cpu(lambda: (progress.advance(1, 2), show_training("student/0", 1, VALUES, None)), 20_000)
    observed = cpu(lambda: STANDING.observe("shard_seconds", 1.0), 20_000)
    monkeypatch.setenv("DISTILL_LOG", "json")
    monkeypatch.setattr(sys, "stderr", StringIO())
    loggers = {name: logging.getLogger(name) for name in logs.OURS}
    before = {name: (each.handlers, each.propagate, each.level) for name, each in loggers.items()}
    try:
        logs.configure()
        lines = 2 * cpu(lambda: logging.getLogger("cluster.bench").info("shard done", extra={"rows": 1}), 5_000)
    finally:
        for name, (handlers, propagate, level) in before.items():
            loggers[name].handlers, loggers[name].propagate = handlers, propagate
            loggers[name].setLevel(level)
    monkeypatch.undo()
    print(f"\na step: {1e6 * told:.1f} µs; a shard: {1e6 * observed:.1f} µs and {1e6 * lines:.0f} µs for two log lines")
    assert told < FLOOR_STEP * 0.1, "of a step of 100 ms"
    assert observed + lines < FLOOR_SHARD * 1.0, "of a shard of one second"


def test_handing_over_to_ray() -> None:
    with Session(cpus=1):
        publisher = Publisher("bench")
        for arm in range(8):
            show_training(f"student/{arm}", 1, VALUES, None)
        publisher.publish()
        seconds = []
        for _ in range(ROUNDS):
            for _ in range(100):
                STANDING.observe("shard_seconds", 1.0)
            seconds.append(cpu(publisher.publish))
        publisher.close()
    took = statistics.median(seconds)
    print(f"\nhanding over, 100 shards since the last time: {1e3 * took:.2f} ms every 5 s, {took / 5:.5f} of a core")
    assert took / 5 < FLOOR_PUBLISH
