"""The one training loop: teacher, student and baseline alike."""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from cluster.engine import Engine
from cluster.gang import Rank
from distill_jobs.errors import TrainingError
from distill_jobs.losses import make_loss, value_at
from distill_jobs.losses.fused_head import FusedHead
from distill_jobs.training.ahead import Ahead, Omissions, Portion
from distill_jobs.training.checkpoint import Errand, Keeper
from distill_jobs.training.culprits import Inquest
from distill_jobs.training.features import FeatureStudent
from distill_jobs.training.guard import Guard, Trouble
from distill_jobs.training.pace import Pace
from distill_jobs.training.scoring import BatchLoss
from distill_jobs.training.source import Source
from distill_jobs.training.task import Arm
from distill_jobs.training.validation import validate


@dataclass
class Progress:
    """What a run has been through: the curve for ``history.json`` and the sums for the ledger."""

    history: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    positions: int = 0
    flops: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0


class Loop:
    """Trains one arm on one rank. ``steps`` optimizer steps at most, fewer when early stopping says so.

    Attributes:
        step: optimizer steps done.
        consumed: samples taken from the order: the reader's one integer.
        keeper: keeps the run's whole state; None keeps none.
        guard, omitted: what has gone wrong, and what the run goes on without because of it.
    """

    def __init__(
        self,
        arm: Arm,
        engine: Engine,
        train: Source,
        validation: Source,
        rank: Rank,
        steps: int,
        head: FusedHead | None = None,
        keeper: Keeper | None = None,
        flops: float | None = None,
        student: FeatureStudent | None = None,
    ) -> None:
        self.arm, self.engine, self.rank, self.steps, self.keeper = arm, engine, rank, steps, keeper
        self.train, self.validation = train, validation
        self.order = train.order(arm.seed)
        soft = make_loss(arm.loss, arm.standardise, arm.gate)
        self.score = BatchLoss(engine, soft, train.facts.targets, head, student)
        self.progress = Progress()
        self.step = self.consumed = 0
        self._waited = 0  # looks at the validation split since the best one
        self._errand = Errand.NONE  # what the keeper is to do after the step, the same on all ranks
        self.guard, self.omitted = Guard(arm.train.on_bad_step), Omissions()
        self.inquest = Inquest(engine, self.score, train, rank)
        self.pace = Pace(rank.device, rank.world_size, engine.config.precision, flops)
        self.every = arm.train.steps_between_looks(train.rows)
        self.log_every = max(1, steps // 100)

    def run(self) -> Progress:
        """Train from where the run stands to its end; the best state is with the keeper when early stopping is on."""
        if self.keeper is not None and self.step == 0 and self.guard.spec.action == "rollback":
            self.keeper.save(self.engine, self.state())
        self._reader = self._ahead()
        try:
            while self.step < self.steps:
                portion, trouble = self._step()
                if trouble is not None:
                    self._mend(portion, trouble)
                    if self.guard.spec.action == "rollback":
                        continue
                better = self._look()
                if self._patience_is_over:
                    break
                self._keep(better)
        finally:
            self._reader.close()
        return self.progress

    def state(self) -> dict[str, Any]:
        """All that the loop knows between two steps, in plain values and the same on all ranks."""
        progress = {**vars(self.progress), "history": list(self.progress.history)}
        if not math.isfinite(self.progress.best_loss):
            progress["best_loss"] = None
        return {
            "step": self.step,
            "consumed": self.consumed,
            "waited": self._waited,
            "progress": progress,
            "guard": self.guard.state(),
            "omitted": {"rows": list(self.omitted.rows), "batches": list(self.omitted.batches)},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was taken, in another process or on another number of ranks."""
        self.step, self.consumed, self._waited = state["step"], state["consumed"], state["waited"]
        progress = dict(state["progress"])
        if progress["best_loss"] is None:
            progress["best_loss"] = math.inf
        self.progress = Progress(**progress)
        self.guard.restore(state["guard"])
        self.omitted = Omissions(**state["omitted"])

    def _look(self) -> bool:
        """Validate where it is time to; whether that was the best so far."""
        if self.step != self.steps and self.step % self.every:
            return False
        look = validate(self.engine, self.score, self.validation, self.arm.train.rows_per_micro_batch, self.rank)
        loss = look.loss
        if self.validation.rows:
            right = {} if look.accuracy is None else {"validation_accuracy": look.accuracy}
            self._tell({"step": self.step, "validation": loss, **right})
            if not math.isfinite(loss):
                raise TrainingError(
                    f"{self.arm.name}: validation loss is {loss} at step {self.step}; lower the learning rate"
                )
        stopping = self.arm.train.early_stopping
        if stopping is None:
            return False
        if loss < self.progress.best_loss - stopping.min_delta:
            self._waited = 0
            self.progress.best_loss, self.progress.best_step = loss, self.step
            return True
        self._waited += 1
        return False

    @property
    def _patience_is_over(self) -> bool:
        stopping = self.arm.train.early_stopping
        return stopping is not None and self._waited >= stopping.patience

    def _keep(self, better: bool) -> None:
        if self.keeper is None or self.step == self.steps:
            return
        if better or self._errand:
            self.keeper.save(self.engine, self.state(), best=better)
        if self._errand == Errand.LEAVE:
            self.keeper.leave()

    def _step(self) -> tuple[Portion, Trouble | None]:
        """Train on the next rows: this rank's share of them, and what was wrong where nothing has moved."""
        started, waited = time.perf_counter(), self._reader.waited
        step = self.step + 1
        portion = self._reader.take()
        micros = portion.micros
        errand = self.keeper.errand(step) if self.keeper is not None and step < self.steps else Errand.NONE
        # One sum tells all ranks all of it: only rank 0 has errands.
        mine = [float(sum(micro.positions for micro in micros)), float(sum(micro.tokens for micro in micros)), errand]
        total, tokens, asked = self._sum(mine)
        self._errand = Errand(int(asked))
        sums = torch.zeros(5, dtype=torch.float64, device=self.rank.device)
        for number, micro in enumerate(micros, 1):
            parts = self.score(micro.batch, micro.signal, *self._weights(step))
            # The engine averages over ranks and micro-batches, which hold unequally many scored positions: the
            # weight makes it the mean over all positions of the step, as the convention says.
            weight = parts.positions * len(micros) * self.rank.world_size / max(1.0, total)
            self.engine.backward(parts.total * weight)
            others = [parts.hard.new_zeros(()) if each is None else each for each in (parts.gated, parts.features)]
            sums += torch.stack([parts.total.detach(), parts.hard, parts.soft, *others]).double() * parts.positions
            if number < len(micros):
                self.engine.step()
        # On a GPU this waits for it, where the engine's own look at the losses would do so in the next line.
        loss, hard, soft, gated, features = (each / max(1.0, total) for each in self._sum(sums.tolist()))
        rate = self.engine.learning_rate
        trouble = self._move(loss)
        self.step, self.consumed = step, portion.end
        self.progress.rows += self.arm.train.batch_size
        self.progress.positions += int(total)
        self.progress.flops += (self.pace.flops or 0.0) * tokens
        self.pace.add(total, tokens, time.perf_counter() - started, self._reader.waited - waited)
        if trouble is None and (step % self.log_every == 0 or step == self.steps):
            learnt = {"loss": loss, "hard": hard, "soft": soft, "learning_rate": rate}
            learnt |= {"gated": gated} if self.arm.gated else {}
            self._log(learnt | ({"features": features} if self.arm.features else {}))
        return portion, trouble

    def _move(self, loss: float) -> Trouble | None:
        """Let the optimizer move, unless the step is bad."""
        trouble = self.guard.look(loss)
        if trouble is not None:
            self.engine.skip()
            return trouble
        outcome = self.engine.step(strict=False)
        if outcome.what == "not_finite":
            return Trouble(str(outcome.culprit), loss)
        self.guard.passed(loss)
        return None

    def _mend(self, portion: Portion, trouble: Trouble) -> None:
        """Say which samples made a step bad, and go on without it as the spec says.

        Raises:
            TrainingError: on all ranks, where the spec doesn't let the run go on.
        """
        step, action = self.step, self.guard.spec.action
        self._reader.close()
        found: dict[int, float] = {}
        if trouble.limit is not None:
            found = self.inquest.find(portion.micros, trouble.limit, *self._weights(step))
        samples = self.inquest.samples(list(found))
        named = f" (samples {', '.join(map(str, samples[:8]))}{', ...' if len(samples) > 8 else ''})" if samples else ""
        said = f"{trouble.said()} at step {step}{named}"
        if not self.guard.count():
            raise TrainingError(self._refusal(said))
        event = {"step": step, "bad": trouble.what, "action": action, "samples": samples}
        event |= {"loss": trouble.loss} if math.isfinite(trouble.loss) else {}
        if action == "rollback":
            event["back_to"] = self._roll_back(portion, list(found))
        self.progress.history.append(event)
        then = f"back to step {self.step}" if action == "rollback" else "left out"
        told = {"arm": self.arm.name, "of": self.steps, "step": step, "bad_steps": self.guard.bad}
        self.rank.report({**told, "bad": f"{said}: {then}"})
        self._reader = self._ahead()

    def _roll_back(self, portion: Portion, rows: list[int]) -> int:
        """Back to the last checkpoint, and on without some rows, or without the step where those are too many."""
        assert self.keeper is not None, "a run that may be rolled back has a keeper"
        omitted = {*self.omitted.rows, *rows}
        if 0 < len(rows) <= self.arm.train.batch_size // 2 and len(omitted) < self.train.rows:
            self.omitted.rows = sorted(omitted)
        else:
            self.omitted.batches.append(portion.start)
        done, bad, left_out = self.progress, self.guard.bad, self.omitted
        self.keeper.wait()
        self.engine.barrier()  # Only now rank 0 has committed what it has to.
        record = self.keeper.restore(self.engine)
        if record is None:
            raise TrainingError(f"{self.arm.name}: there is no whole checkpoint left to go back to")
        self.restore(record["loop"])
        # What was done counts, and what was learnt about the data.
        self.guard.bad, self.omitted = bad, left_out
        self.progress.rows, self.progress.positions, self.progress.flops = done.rows, done.positions, done.flops
        kept = len(self.progress.history)
        self.progress.history += [entry for entry in done.history[kept:] if "bad" in entry]
        return self.step

    def _refusal(self, said: str) -> str:
        train = f"{'teacher' if self.arm.role == 'teacher' else 'student'}.train"
        most = self.guard.spec.max
        after = f", and there were {most} bad steps before" if self.guard.bad > most else ""
        return (
            f"{self.arm.name}: {said}{after}; nothing was updated; lower {train}.learning_rate, look at these "
            f"samples, or see {train}.on_bad_step"
        )

    def _weights(self, step: int) -> tuple[float, float]:
        """Alpha and T of a step."""
        config = self.engine.config
        return value_at(self.arm.alpha, step, config), value_at(self.arm.temperature, step, config)

    def _log(self, learnt: dict[str, float]) -> None:
        entry = {"step": self.step, **learnt, **self.pace.take()}
        if self.arm.reads_soft:
            entry["alpha"], entry["temperature"] = self._weights(self.step)
        if self.engine.gradient_norm is not None:
            entry["gradient_norm"] = self.engine.gradient_norm
        self._tell(entry)

    def _tell(self, entry: dict[str, Any]) -> None:
        """Into the history, and to the driver, which doesn't keep this rank waiting."""
        self.progress.history.append(entry)
        self.rank.report({"arm": self.arm.name, "of": self.steps, **entry})

    def _sum(self, values: list[float]) -> list[float]:
        return self.engine.sum(values) if self.rank.world_size > 1 else values

    def _ahead(self) -> Ahead:
        left = self.steps - self.step
        return Ahead(self.train, self.order, self.arm.train, self.rank, self.consumed, left, self.omitted)


def steps_of(rows: int, epochs: float, steps: int | None, batch_size: int) -> int:
    """Optimizer steps of a run: as given, or as many as the epochs take, the last batch filled from the next epoch."""
    return steps or max(1, math.ceil(rows * epochs / batch_size))
