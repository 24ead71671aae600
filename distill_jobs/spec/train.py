"""The parts of a job spec that say how a model is trained. Imports neither torch nor ray."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cluster.engine_config import EngineConfig, refusals
from distill_jobs.spec.base import Part, Positive, Precision, Share

Workers = Positive | tuple[Positive, Positive]
"""A number of workers, or the fewest and the most, between which the gang follows the cluster."""


class EarlyStopping(Part):
    """Stop when the validation loss has not fallen by ``min_delta`` for ``patience`` evaluations; keep the best."""

    patience: Positive = 3
    min_delta: Annotated[float, Field(ge=0)] = 0.0


class Checkpoint(Part):
    """When a run's whole state is kept, so that no step is lost: after so many steps, so many minutes, or both.

    ``keep`` are the last ones that stay; with early stopping the best one stays beside them, to be saved at the end.
    Without ``every_steps`` and ``every_minutes`` there are none.
    """

    every_steps: Positive | None = None
    every_minutes: Annotated[float, Field(gt=0)] | None = 10.0
    keep: Positive = 2


class OnBadStep(Part):
    """What to do with a step whose loss or gradient is not finite, or whose loss is a spike.

    ``stop`` ends the run before anything has moved; ``skip`` leaves the step out; ``rollback`` goes back to the last
    checkpoint and on without the offending samples. A spike is a loss above the mean of the recent ones by more than
    ``spike`` standard deviations; without it only what is not finite is bad. More than ``max`` bad steps end the run.
    """

    action: Literal["stop", "skip", "rollback"] = "stop"
    spike: Annotated[float, Field(gt=0)] | None = None
    max: Positive = 10


class Train(Part):
    """One training run by DeepSpeed. ``batch_size`` is the rows of one optimizer step, over all workers.

    ``workers`` is a number or [least, most]. ``schedule`` warms up over the share ``warmup`` of the steps; ``wsd``
    then stays at the peak and falls over the share ``decay`` at the end; ``final`` is the share of the peak where it,
    ``linear`` and ``cosine`` arrive. ``offload`` keeps the optimizer, or the parameters too, in the host's memory.
    ``ema`` is the decay of a moving average of the weights. ``deepspeed`` takes any further keys of DeepSpeed's
    config. ``max_failures`` is how often a gang that has lost a worker starts again from its last checkpoint.
    ``evaluate_every`` counts the steps between two looks at the validation split; by default one look an epoch.
    ``fused_loss`` computes a language model's output head and its losses together, in chunks of positions; ``compiled``
    has its passes over rows compiled by ``torch.compile`` where that can help.
    """

    RESOURCES: ClassVar[frozenset[str]] = frozenset(
        {
            "workers", "micro_batch", "cpus_per_worker", "gpus_per_worker", "zero_stage", "offload", "optimizer",
            "activation_checkpointing", "max_failures", "checkpoint", "fused_loss",
        }
    )  # fmt: skip
    """Keys that say where and how the work runs, and change nothing of what comes out, beyond rounding."""

    epochs: Annotated[float, Field(gt=0)] = 3.0
    steps: Positive | None = None
    batch_size: Positive = 64
    micro_batch: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup: Share = 0.05
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip: Annotated[float, Field(ge=0)] = 1.0
    precision: Precision = "auto"
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: Literal["none", "optimizer", "parameters"] = "none"
    activation_checkpointing: bool = False
    optimizer: Literal["auto", "adamw", "adamw_fused"] = "auto"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    deepspeed: dict[str, Any] = {}
    workers: Workers = 1
    cpus_per_worker: Positive = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    max_failures: Annotated[int, Field(ge=0)] = 3
    checkpoint: Checkpoint = Checkpoint()
    on_bad_step: OnBadStep = OnBadStep()
    evaluate_every: Positive | None = None
    early_stopping: EarlyStopping | None = None
    fused_loss: bool | Literal["compiled"] = True

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if self.least_workers > self.most_workers:
            raise ValueError(f"workers are [least, most], but {self.least_workers} is more than {self.most_workers}")
        if self.batch_size % (self.most_workers * (self.micro_batch or 1)):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of workers {self.most_workers} × micro_batch "
                f"{self.micro_batch or 1}"
            )
        if self.least_workers not in self.gang_sizes:
            raise ValueError(
                f"batch_size {self.batch_size} can't be divided among the least workers, {self.least_workers}, in "
                f"micro-batches of {self.rows_per_micro_batch}: give a micro_batch that divides every worker's share"
            )
        return self

    @model_validator(mode="after")
    def _schedule_has_room(self) -> Self:
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup:g} and decay {self.decay:g} take more than all steps together")
        return self

    @model_validator(mode="after")
    def _deepspeed_agrees(self) -> Self:
        if self.offload == "optimizer" and self.zero_stage < 2:
            raise ValueError(f"offload: optimizer needs zero_stage 2 or 3, not {self.zero_stage}")
        if self.offload == "parameters" and self.zero_stage < 3:
            raise ValueError(f"offload: parameters needs zero_stage 3, not {self.zero_stage}")
        found = refusals(self.engine(total_steps=1))
        if found:
            raise ValueError("; ".join(found))
        return self

    @property
    def least_workers(self) -> int:
        """Workers that must find room before training begins."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def rows_per_micro_batch(self) -> int:
        """Rows that one worker takes through the model at once, however many workers there are."""
        return self.micro_batch or self.batch_size // self.most_workers

    @property
    def accumulation(self) -> int:
        """Micro-batches between two optimizer steps where all workers are there."""
        return self.accumulation_of(self.most_workers)

    def accumulation_of(self, workers: int) -> int:
        """Micro-batches between two optimizer steps of a gang of ``workers``, one of ``gang_sizes``."""
        return self.batch_size // (workers * self.rows_per_micro_batch)

    @property
    def gang_sizes(self) -> tuple[int, ...]:
        """The numbers of workers, from the least to the most, that divide a step's rows into whole micro-batches."""
        sizes = range(self.least_workers, self.most_workers + 1)
        return tuple(n for n in sizes if self.batch_size % (n * self.rows_per_micro_batch) == 0)

    def steps_between_looks(self, rows: int) -> int:
        """Steps between two looks at the validation split, for ``rows`` training rows; the last step has one too."""
        return self.evaluate_every or max(1, -(-rows // self.batch_size))

    def engine(self, total_steps: int, workers: int | None = None, precision: str | None = None) -> EngineConfig:
        """What this asks of the engine of each of ``workers`` ranks; ``precision`` as resolved on their device."""
        return EngineConfig(
            rows_per_micro_batch=self.rows_per_micro_batch,
            accumulation=self.accumulation_of(workers or self.most_workers),
            total_steps=total_steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warmup_steps=round(self.warmup * total_steps),
            clip=self.clip,
            precision=precision or self.precision,
            zero_stage=self.zero_stage,
            decay=self.decay,
            final=self.final,
            optimizer=self.optimizer,
            offload=self.offload,
            activation_checkpointing=self.activation_checkpointing,
            ema=self.ema,
            deepspeed=self.deepspeed,
        )
