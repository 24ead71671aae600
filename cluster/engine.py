"""The DeepSpeed engine behind one small interface: torch's AdamW under ZeRO 0 to 3, in fp32, bf16 or fp16."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster.engine_build import build_optimizer, exact_frequencies, import_deepspeed, recompute
from cluster.engine_config import EngineConfig, refusals, settings_of
from cluster.engine_shards import EMA, MASTER, Shards, scaler_state, set_scaler
from cluster.engine_state import Snapshot, load_snapshot, take_snapshot
from cluster.errors import ClusterError, NonFiniteError, ResourceError, one_line


def resolve_precision(wanted: str, device_type: str) -> str:
    """``auto`` becomes ``bf16`` where the hardware multiplies it natively, else ``fp32``; the rest stays as it is.

    Raises:
        ResourceError: fp16 on a CPU, which has no use for it.
    """
    if wanted == "fp16" and device_type == "cpu":
        raise ResourceError("precision fp16 needs a GPU: choose bf16, fp32 or auto")
    if wanted != "auto":
        return wanted
    if device_type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    cpu: Any = torch.cpu
    return "bf16" if cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported() else "fp32"


@dataclass(frozen=True)
class Outcome:
    """What became of the gradients, the same on all ranks. True when the parameters moved.

    Attributes:
        what: ``pending`` (more micro-batches are to come), ``moved``, ``skipped`` (on request, or as fp16's loss scale
            was too high) or ``not_finite``. The last two have dropped the gradients and moved nothing.
        culprit: ``loss`` or ``gradient``, where that was not finite.
    """

    what: str
    culprit: str | None = None

    def __bool__(self) -> bool:
        return self.what == "moved"


class Engine:
    """A module in training. Every rank of the gang builds one from equal weights and calls the same methods in step.

    Args:
        module: full on every rank, in fp32; it is moved to ``device`` and converted to the precision in place.
        config: the run.
        device: ``cpu`` or ``cuda:<index>``.

    Raises:
        ClusterError: the config contradicts itself, DeepSpeed refuses it, or nothing is to be trained.
    """

    def __init__(self, module: nn.Module, config: EngineConfig, device: str) -> None:
        said = refusals(config)
        if said:
            raise ClusterError("; ".join(said))
        self.config, self.device = config, torch.device(device)
        self.steps = 0  # that moved the parameters
        self.gradient_norm: float | None = None  # of the last step, over all ranks, before clipping
        self._module = module.to(self.device)
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
        self._bad_losses = torch.zeros((), device=self.device)  # on this rank, since the last step
        self._micro_batches = 0
        self._linear = nn.functional.linear  # ZeRO-3 puts one of its own in its place, for the whole process
        if config.activation_checkpointing:
            recompute(module)
        optimizer = build_optimizer(module, config)
        settings = settings_of(config, sum(p.numel() for p in module.parameters() if p.requires_grad))
        deepspeed = import_deepspeed(self.device)
        with exact_frequencies(module):
            try:
                self._engine, *_ = deepspeed.initialize(
                    model=module, optimizer=optimizer, config=settings, dist_init_required=False
                )
            except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
                raise ClusterError(f"DeepSpeed refuses its config: {one_line(error)}") from None
        self._shards = Shards(module, self._engine, config.zero_stage, config.ema is not None)

    def forward(self, **inputs: Any) -> Any:
        """What the module returns; floating-point inputs are converted to its precision first."""
        return self._engine(**{name: self._fit(value) for name, value in inputs.items()})

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` / ``accumulation``, averaged over ranks."""
        self._bad_losses += ~torch.isfinite(loss.detach()).all()
        self._engine.backward(loss)
        self._micro_batches += 1

    def step(self, strict: bool = True) -> Outcome:
        """Call after each ``backward``; the optimizer moves after every ``accumulation``-th call.

        Raises:
            NonFiniteError: where ``strict``, on all ranks, before any parameter has moved, when a loss or a gradient
                on any rank since the last step was not finite. Otherwise the outcome says so. In fp16 an infinite
                gradient is a matter of course: the step is skipped and the loss scale lowered.
        """
        if not self._due:
            self._engine.step()
            return Outcome("pending")
        torch.distributed.all_reduce(self._bad_losses)
        if self._bad_losses.item():
            self._drop()
            found = Outcome("not_finite", "loss")
        else:
            found = self._move()
        if strict and found.what == "not_finite":
            raise NonFiniteError(
                f"the {found.culprit} is not finite at optimizer step {self.steps + 1}, learning rate "
                f"{self.learning_rate:.3g}; no parameter was moved: lower the learning rate, clip gradients, or use "
                f"precision fp32"
            )
        return found

    def skip(self) -> Outcome:
        """In the place of the ``step`` that would have moved the optimizer: drop the gradients. All ranks call it."""
        assert self._due, "skip takes the place of a step after the last micro-batch"
        self._drop()
        return Outcome("skipped")

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.config.learning_rate_at(self.steps)

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def full_state(self, ema: bool = False) -> dict[str, Tensor] | None:
        """The module's whole state dict on rank 0's CPU, None elsewhere; every rank must call.

        Floating-point tensors come in fp32, trained parameters from their masters, or with ``ema`` from their moving
        average where one is kept. Tensors that the module shares are shared here too.
        """
        keep = torch.distributed.get_rank() == 0
        key = EMA if ema and self.config.ema is not None else MASTER
        trained = {id(parameter): name for name, parameter in self._shards.parameters.items()}
        tensors: dict[str, Tensor] = dict(self._module.state_dict(keep_vars=True))
        copies: dict[int, Tensor] = {}
        for tensor in tensors.values():
            if id(tensor) in copies:
                continue
            name = trained.get(id(tensor))
            whole = self._shards.whole(name, key, self.device) if name is not None else _gathered(tensor)
            kind = torch.float32 if whole.is_floating_point() else whole.dtype
            copies[id(tensor)] = whole.detach().to("cpu", kind, copy=True) if keep else torch.empty(0)
        return {name: copies[id(tensor)] for name, tensor in tensors.items()} if keep else None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module with its moving average for weights, to evaluate it; as it is where none is kept."""
        if self.config.ema is None:
            yield
            return
        self._shards.swap_average()
        try:
            yield
        finally:
            self._shards.swap_average()

    def snapshot(self) -> Snapshot:
        """The training state of this moment, between two optimizer steps, in the host's memory; every rank must call.

        Masters, AdamW's moments and counters, the step of the schedule, the moving average, fp16's loss scale and the
        module's buffers: what continues bit for bit on as many ranks at the same ZeRO stage, and to rounding on others.
        """
        assert self._micro_batches % self.config.accumulation == 0, "a snapshot is taken between optimizer steps"
        return take_snapshot(self._shards, self._module, self.steps, scaler_state(self._engine.optimizer))

    def load_state(self, folder: Path) -> None:
        """Take up the state whose files all ranks have written into ``folder``; every rank must call.

        Raises:
            CheckpointError: files are missing or damaged, or belong to another model.
        """
        facts = load_snapshot(folder, self._shards, self._module)
        set_scaler(self._engine.optimizer, facts["scaler"])
        self.steps = int(facts["steps"])

    def train(self) -> None:
        """Switch the module to training."""
        self._engine.train()

    def eval(self) -> None:
        """Switch the module to evaluation; call ``forward`` under ``torch.no_grad()``."""
        self._engine.eval()

    def barrier(self) -> None:
        """Wait for all ranks."""
        torch.distributed.barrier()

    def close(self) -> None:
        """Let go of DeepSpeed's buffers and hooks, and of what it changed in torch."""
        self._engine.destroy()
        nn.functional.linear = self._linear

    @property
    def _due(self) -> bool:
        return self._micro_batches > 0 and self._micro_batches % self.config.accumulation == 0

    def _fit(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self._dtype if value.is_floating_point() else None)

    def _move(self) -> Outcome:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if self._plain:
            # Here DeepSpeed keeps no norm and checks nothing, but leaves the averaged gradients where torch has them.
            gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
            self.gradient_norm = float(torch.nn.utils.get_total_norm(gradients))
            if not self.gradient_norm < float("inf"):
                self._drop()
                return Outcome("not_finite", "gradient")
        try:
            self._engine.step()
        except Exception as error:
            if "loss scale already at minimum" in str(error):
                raise NonFiniteError("fp16's loss scale can't be lowered any further: use bf16 or fp32") from None
            raise
        if not self._plain:
            # DeepSpeed looks at the norm over all ranks before it moves anything, and drops what is not finite.
            self.gradient_norm = float(self._engine.get_global_grad_norm())
        if not self._engine.was_step_applied():
            return Outcome("skipped") if self.config.precision == "fp16" else Outcome("not_finite", "gradient")
        self.steps += 1
        if self.config.ema is not None:
            # A short memory at first, lest the average be of weights that nobody has trained.
            self._shards.average(min(self.config.ema, (1 + self.steps) / (10 + self.steps)))
        return Outcome("moved")

    @property
    def _plain(self) -> bool:
        return self.config.zero_stage == 0 and self.config.precision == "fp32"

    def _drop(self) -> None:
        """Have DeepSpeed drop the gradients by its own means, which differ from stage to stage: those of an overflow,
        whether there was one or not."""
        optimizer = self._engine.optimizer
        kept = scaler_state(optimizer)
        with _overflowing(optimizer):
            self._engine.step()
        set_scaler(optimizer, kept)
        self._bad_losses.zero_()


@contextmanager
def _overflowing(optimizer: Any) -> Iterator[None]:
    def overflow(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    def clear() -> None:
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
        optimizer.overflow = True

    changes: list[tuple[Any, str, Any]]
    if hasattr(optimizer, "_overflow_check_and_loss_scale_update"):  # stage 3
        changes = [(optimizer, "_overflow_check_and_loss_scale_update", overflow)]
    elif hasattr(optimizer, "check_grad_overflow"):  # stages 1 and 2
        changes = [(optimizer, "check_grad_overflow", True), (optimizer, "check_overflow", overflow)]
    elif hasattr(optimizer, "overflow_checker"):  # stage 0 in bf16 and fp16
        changes = [(optimizer.overflow_checker, "check", overflow)]
    elif hasattr(optimizer, "clear_hp_grads"):  # stage 1 in bf16 with gradients added up in fp32
        changes = [(optimizer, "step", clear)]
    else:  # stage 0 in fp32: torch's own
        changes = [(optimizer, "step", lambda: None)]
    before = [(owner, name, vars(owner).get(name, owner)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is owner:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _gathered(tensor: Tensor) -> Tensor:
    """A tensor that is not trained, whole; under ZeRO-3 a frozen parameter is in pieces."""
    if not hasattr(tensor, "ds_id"):
        return tensor
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([tensor]):
        return tensor.detach().clone()
