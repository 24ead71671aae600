"""What one training run asks of DeepSpeed, and the DeepSpeed config that says it. Imports no torch, so that a spec can
be checked with it."""

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Elements that are reduced or gathered at once; DeepSpeed's default of 5e8 allocates 2 GB of them up front.
_BUCKET = 50_000_000

# The keys that DeepSpeed 0.19 reads. It passes over any other in silence, a misspelt one too.
_KNOWN = [
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "managed_gradient_accumulation", "optimizer", "scheduler", "communication_data_type",
    "seq_parallel_communication_data_type", "prescale_gradients", "gradient_predivide_factor",
    "gradient_allreduce_op", "sparse_gradients", "fp16", "bf16", "bfloat16", "torch_autocast",
    "gradient_clipping", "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_allgather",
    "disable_python_gc", "check_overflow", "flops_profiler", "activation_checkpointing", "aio", "comms_logger",
    "tensorboard", "wandb", "csv_monitor", "comet", "data_types", "checkpoint", "compile", "timers",
    "weight_quantization", "hybrid_engine", "pipeline", "tensor_parallel", "expert_parallel",
    "sequence_parallel_size", "data_efficiency", "use_data_before_expert_parallelism", "dataloader_drop_last",
    "vocabulary_size", "log_level", "data_parallel_group", "global_rank", "monitor_config", "graph_harvesting",
]  # fmt: skip


@dataclass(frozen=True)
class EngineConfig:
    """One training run.

    Attributes:
        rows_per_micro_batch: rows that this rank takes through the model at once.
        accumulation: micro-batches between two optimizer steps.
        total_steps: optimizer steps of the whole run, to which the schedule decays.
        learning_rate: the peak.
        weight_decay: AdamW's, on all that is trained but biases and the parameters of norm layers.
        schedule: ``constant``, ``linear``, ``cosine`` or ``wsd`` (warm-up, stable, decay).
        warmup_steps: steps of linear warm-up.
        clip: the largest norm of the whole gradient; 0 leaves it alone.
        precision: ``fp32``, ``bf16`` or ``fp16``; the latter two keep fp32 master weights.
        zero_stage: 0 to 3.
        decay: the share of all steps that ``wsd`` spends on its decay, at the end.
        final: the share of the peak to which ``linear``, ``cosine`` and ``wsd`` fall.
        optimizer: ``adamw``, ``adamw_fused`` (one kernel for many parameters) or ``auto``: fused where the device
            has it.
        offload: ``none``, ``optimizer`` (masters and moments live in the host's memory; ZeRO 2 and 3) or
            ``parameters`` (those too; ZeRO 3).
        activation_checkpointing: compute the layers' activations again in the backward pass instead of keeping them.
        ema: the decay of an exponential moving average of the parameters, or None.
        deepspeed: further keys of DeepSpeed's config, as its documentation names them. ``auto`` counts as not given.
    """

    rows_per_micro_batch: int
    accumulation: int
    total_steps: int
    learning_rate: float
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup_steps: int = 0
    clip: float = 0.0
    precision: str = "fp32"
    zero_stage: int = 0
    decay: float = 0.2
    final: float = 0.0
    optimizer: str = "auto"
    offload: str = "none"
    activation_checkpointing: bool = False
    ema: float | None = None
    deepspeed: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0.

        ``wsd`` holds the peak and then falls by 1-√x of the decay phase, the form that did best in Hägele et al.
        2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations".
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        start = self.decay_start
        done = min(1.0, max(0.0, (step - start) / max(1, self.total_steps - start)))
        shape = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
            "wsd": 1.0 - math.sqrt(done),
        }[self.schedule]
        return self.learning_rate * (self.final + (1.0 - self.final) * shape)

    @property
    def decay_start(self) -> int:
        """The step from which the learning rate falls."""
        if self.schedule != "wsd":
            return self.warmup_steps
        return max(self.warmup_steps, self.total_steps - max(1, round(self.decay * self.total_steps)))


def refusals(config: EngineConfig) -> list[str]:
    """What ``config.deepspeed`` says otherwise than the rest of the config, and keys that DeepSpeed doesn't know.

    One sentence each, with both names; empty when all is well.
    """
    said = []
    for key in config.deepspeed:
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.6)
            said.append(f"deepspeed.{key} is no key of DeepSpeed's{f'; did you mean {near[0]}?' if near else ''}")
    decided = _decided(config)
    for path, given in _leaves(config.deepspeed):
        rule = next((name for name in decided if path == name or path.startswith(f"{name}.")), None)
        if rule is None:
            continue
        key, value = decided[rule]
        if value is None or given != value:
            ours = "" if value is None else f", which makes it {_plain(value)}"
            said.append(f"deepspeed.{path} is {_plain(given)}, but that is said by {key}{ours}: remove one of them")
    return said


def settings_of(config: EngineConfig, size: int) -> dict[str, Any]:
    """DeepSpeed's own config for a model of ``size`` trained parameters; the user's keys come on top."""
    # DeepSpeed takes no odd bucket.
    bucket = max(2, min(_BUCKET, size + size % 2))
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if config.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": 10 * _BUCKET}
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    ours = {
        "train_micro_batch_size_per_gpu": config.rows_per_micro_batch,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own optimizer for the host is compiled on first use, for which a machine may lack a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "steps_per_print": None,
    }
    return _merged(ours, config.deepspeed)


def _decided(config: EngineConfig) -> dict[str, tuple[str, Any]]:
    """Keys of DeepSpeed's that the config decides: under which name, and as what (None: never to be given)."""
    known = config.precision != "auto"
    host = {"none": (None, None), "optimizer": ("cpu", None), "parameters": ("cpu", "cpu")}[config.offload]
    return {
        "train_batch_size": ("batch_size", None),
        "train_micro_batch_size_per_gpu": ("micro_batch", config.rows_per_micro_batch),
        "gradient_accumulation_steps": ("batch_size, workers and micro_batch", config.accumulation),
        "managed_gradient_accumulation": ("batch_size", True),
        "gradient_allreduce_op": ("batch_size", "mean"),
        "gradient_clipping": ("clip", config.clip),
        "zero_optimization.stage": ("zero_stage", config.zero_stage),
        "zero_optimization.offload_optimizer.device": ("offload", host[0] or "none"),
        "zero_optimization.offload_optimizer.ratio": ("offload", 1.0),
        "zero_optimization.offload_param.device": ("offload", host[1] or "none"),
        "zero_optimization.cpu_offload": ("offload", None),
        "bf16.enabled": ("precision", config.precision == "bf16" if known else None),
        "bfloat16": ("precision", None),
        "fp16.enabled": ("precision", config.precision == "fp16" if known else None),
        "torch_autocast.enabled": ("precision", False),
        "bf16.bf16_master_weights_and_grads": ("precision, whose masters are fp32", False),
        "fp16.fp16_master_weights_and_grads": ("precision, whose masters are fp32", False),
        "bf16.check_grad_overflow": ("on_bad_step", True),
        "optimizer": ("optimizer, learning_rate and weight_decay", None),
        "scheduler": ("schedule and warmup", None),
        "zero_allow_untested_optimizer": ("optimizer", True),
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value != "auto":
            yield f"{prefix}{key}", value


def _merged(ours: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(ours)
    for key, value in given.items():
        if isinstance(value, Mapping):
            below = found.get(key)
            found[key] = _merged(below if isinstance(below, dict) else {}, value)
        elif value != "auto":
            found[key] = value
    return found


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
