"""The one training loop: teacher, student and baseline alike."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from cluster.engine import Engine
from cluster.gang import Rank
from distill_jobs.data.batch import Batch
from distill_jobs.errors import TrainingError
from distill_jobs.losses import LossParts, make_loss, value_at
from distill_jobs.losses.fused_head import FusedHead
from distill_jobs.training.checkpoint import Errand, Keeper
from distill_jobs.training.feed import even_shares, share_of_rank
from distill_jobs.training.scoring import BatchLoss
from distill_jobs.training.source import Source
from distill_jobs.training.task import Arm


@dataclass
class Progress:
    """What a run has been through: the curve for ``history.json`` and the sums for the ledger."""

    history: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    positions: int = 0
    best_loss: float = math.inf
    best_step: int = 0


class Loop:
    """Trains one arm on one rank. ``steps`` optimizer steps at most, fewer when early stopping says so.

    Attributes:
        step: optimizer steps done.
        consumed: samples taken from the order: the reader's one integer.
        keeper: keeps the run's whole state; None keeps none.
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
    ) -> None:
        self.arm, self.engine, self.rank, self.steps, self.keeper = arm, engine, rank, steps, keeper
        self.train, self.validation = train, validation
        self.order = train.order(arm.seed)
        self.score = BatchLoss(engine, make_loss(arm.loss, arm.standardise), train.facts.targets, head)
        self.progress = Progress()
        self.step = self.consumed = 0
        self._waited = 0  # looks at the validation split since the best one
        self._errand = Errand.NONE  # what the keeper is to do after the step, the same on all ranks
        self.every = max(1, math.ceil(train.rows / arm.train.batch_size))
        self.log_every = max(1, steps // 100)
        self._reported = time.perf_counter()

    def run(self) -> Progress:
        """Train from where the run stands to its end; the best state is with the keeper when early stopping is on."""
        while self.step < self.steps:
            step = self.step + 1
            parts, seconds = self._step(step)
            self.step = step
            if step % self.log_every == 0 or step == self.steps:
                self._log(step, parts, seconds)
            better = self._look(step)
            if self._patience_is_over:
                break
            self._keep(better)
        return self.progress

    def state(self) -> dict[str, Any]:
        """All that the loop knows between two steps, in plain values and the same on all ranks."""
        progress = {**vars(self.progress), "history": list(self.progress.history)}
        if not math.isfinite(self.progress.best_loss):
            progress["best_loss"] = None
        return {"step": self.step, "consumed": self.consumed, "waited": self._waited, "progress": progress}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` was taken, in another process or on another number of ranks."""
        self.step, self.consumed, self._waited = state["step"], state["consumed"], state["waited"]
        progress = dict(state["progress"])
        if progress["best_loss"] is None:
            progress["best_loss"] = math.inf
        self.progress = Progress(**progress)

    def _look(self, step: int) -> bool:
        """Validate where it is time to; whether that was the best so far."""
        stopping = self.arm.train.early_stopping
        if not (step == self.steps or (stopping and step % self.every == 0)):
            return False
        loss = self._validate(step)
        if stopping is None:
            return False
        if loss < self.progress.best_loss - stopping.min_delta:
            self._waited = 0
            self.progress.best_loss, self.progress.best_step = loss, step
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

    def _step(self, step: int) -> tuple[LossParts, float]:
        started = time.perf_counter()
        spec = self.arm.train
        rows = self.order.take(self.consumed, spec.batch_size)
        self.consumed += spec.batch_size
        shares = share_of_rank(rows, spec.rows_per_micro_batch, self.rank.rank, self.rank.world_size)
        loaded = [self.train.load(share, self.rank.device) for share in shares]
        scored = float(sum(batch.positions for batch, _ in loaded))
        errand = self.keeper.errand(step) if self.keeper is not None and step < self.steps else Errand.NONE
        # One sum tells all ranks both: only rank 0 has errands.
        total, asked = self.engine.sum([scored, errand]) if self.rank.world_size > 1 else (scored, errand)
        self._errand = Errand(int(asked))
        sums = torch.zeros(3, device=self.rank.device)
        for batch, signal in loaded:
            parts = self.score(batch, signal, *self._weights(step))
            self._refuse_non_finite(parts, batch, step)
            # The engine averages over ranks and micro-batches, which hold unequally many scored positions: the
            # weight makes it the mean over all positions of the step, as the convention says.
            weight = parts.positions * len(loaded) * self.rank.world_size / max(1.0, total)
            self.engine.backward(parts.total * weight)
            sums += torch.stack([parts.total.detach(), parts.hard.detach(), parts.soft.detach()]) * parts.positions
            self.engine.step()
        self.progress.rows += spec.batch_size
        self.progress.positions += int(total)
        mean = sums / max(1.0, scored)
        return LossParts(mean[0], mean[1], mean[2], int(scored)), time.perf_counter() - started

    def _weights(self, step: int) -> tuple[float, float]:
        """Alpha and T of a step."""
        config = self.engine.config
        return value_at(self.arm.alpha, step, config), value_at(self.arm.temperature, step, config)

    def _refuse_non_finite(self, parts: LossParts, batch: Batch, step: int) -> None:
        if parts.positions and not torch.isfinite(parts.total):
            rows = ", ".join(str(i) for i in batch.sample_ids[:8].tolist())
            raise TrainingError(
                f"{self.arm.name}: the loss is {parts.total.item()} at step {step} (samples {rows}, ...); nothing was "
                f"updated; lower {'teacher' if self.arm.role == 'teacher' else 'student'}.train.learning_rate or "
                f"look at these samples"
            )

    def _log(self, step: int, parts: LossParts, seconds: float) -> None:
        entry = {
            "step": step,
            "loss": float(parts.total),
            "hard": float(parts.hard),
            "soft": float(parts.soft),
            "learning_rate": self.engine.learning_rate,
            "positions_per_second": parts.positions * self.rank.world_size / seconds,
        }
        if self.arm.reads_soft:
            entry["alpha"], entry["temperature"] = self._weights(step)
        if self.engine.gradient_norm is not None:
            entry["gradient_norm"] = self.engine.gradient_norm
        self.progress.history.append(entry)
        self.rank.report({"arm": self.arm.name, "of": self.steps, **entry})

    def _validate(self, step: int) -> float:
        """Mean hard-label loss over the validation split, the same for every arm; infinite when there is none."""
        if self.validation.rows == 0:
            return math.inf
        self.engine.eval()
        sums = [0.0, 0.0]
        with torch.no_grad(), self.engine.averaged():
            for batch in self._validation_batches():
                parts = self.score(batch, None, 0.0, 1.0)
                if parts.positions:
                    sums = [sums[0] + float(parts.hard) * parts.positions, sums[1] + parts.positions]
        self.engine.train()
        total, positions = self.engine.sum(sums)
        loss = total / max(1.0, positions)
        self.progress.history.append({"step": step, "validation": loss})
        self.rank.report({"arm": self.arm.name, "of": self.steps, "step": step, "validation": loss})
        if not math.isfinite(loss):
            raise TrainingError(f"{self.arm.name}: validation loss is {loss} at step {step}; lower the learning rate")
        return loss

    def _validation_batches(self) -> Iterator[Batch]:
        micro = self.arm.train.rows_per_micro_batch
        for rows, real in even_shares(self.validation.rows, micro, self.rank.rank, self.rank.world_size):
            batch, _ = self.validation.load(rows, self.rank.device)
            batch.labels[torch.from_numpy(~real)] = -100
            yield batch


def steps_of(rows: int, epochs: float, steps: int | None, batch_size: int) -> int:
    """Optimizer steps of a run: as given, or as many as the epochs take, the last batch filled from the next epoch."""
    return steps or max(1, math.ceil(rows * epochs / batch_size))
