"""The DeepSpeed engine behind one small interface: plain torch AdamW under ZeRO 0 to 3, in fp32, bf16 or fp16.

DeepSpeed's own fused optimizers are compiled on first use, for which a user's machine may lack a compiler; torch's
AdamW is as exact, and is all that the models of a distillation job need.
"""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cluster.engine_config import EngineConfig, settings_of
from cluster.errors import ClusterError, NonFiniteError, ResourceError


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


class Engine:
    """A module in training. Every rank of the gang builds one from equal weights and calls the same methods in step.

    Args:
        module: full on every rank, in fp32; it is moved to ``device`` and converted to the precision in place.
        config: the run.
        device: ``cpu`` or ``cuda:<index>``.
    """

    def __init__(self, module: nn.Module, config: EngineConfig, device: str) -> None:
        self.config, self.device = config, torch.device(device)
        self.steps = 0  # that moved the parameters
        self.gradient_norm: float | None = None  # of the last step, over all ranks, before clipping
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(_groups(trained, config.weight_decay), lr=config.learning_rate_at(0))
        self._module = module.to(self.device)
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
        self._bad = torch.zeros(2, device=self.device)  # has a loss, has a gradient been non-finite?
        self._micro_batches = 0
        size = sum(p.numel() for p in trained)
        with _exact_frequencies(self._module):
            self._engine, *_ = _deepspeed(self.device).initialize(
                model=self._module, optimizer=optimizer, config=settings_of(config, size), dist_init_required=False
            )
        self._masters = _masters(self._engine.optimizer) if config.zero_stage == 0 else {}
        # fp16 meets infinite gradients as a matter of course: DeepSpeed skips the step and lowers the loss scale.
        watched: list[Any] = list(trained) if config.precision != "fp16" else []
        self._hooks = [parameter.register_hook(self._watch) for parameter in watched]

    def forward(self, **inputs: Any) -> Any:
        """What the module returns; floating-point inputs are converted to its precision first."""
        return self._engine(**{name: self._fit(value) for name, value in inputs.items()})

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss`` / ``accumulation``, averaged over ranks."""
        self._bad[0] += ~torch.isfinite(loss.detach()).all()
        self._engine.backward(loss)
        self._micro_batches += 1

    def step(self) -> bool:
        """Call after each ``backward``. Returns True when the optimizer moved: after every ``accumulation``-th call,
        except where fp16 overflowed.

        Raises:
            NonFiniteError: on all ranks, before any parameter has moved, when a loss or a gradient on any rank since
                the last step was not finite.
        """
        due = self._micro_batches % self.config.accumulation == 0
        if due:
            self._stop_if_not_finite()
            for group in self._engine.optimizer.param_groups:
                group["lr"] = self.learning_rate
            self.gradient_norm = self._plain_norm()
        self._engine.step()
        if not due or not self._engine.was_step_applied():
            return False
        norm = self._engine.get_global_grad_norm()
        self.gradient_norm = self.gradient_norm if norm is None else float(norm)
        self.steps += 1
        return True

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.config.learning_rate_at(self.steps)

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def full_state(self) -> dict[str, Tensor] | None:
        """The module's whole state dict on rank 0's CPU, None elsewhere; every rank must call.

        Floating-point tensors come in fp32, trained parameters from their masters. Tensors that the module shares are
        shared here too.
        """
        keep = torch.distributed.get_rank() == 0
        names = {name: tensor for name, tensor in self._module.state_dict(keep_vars=True).items()}
        copies: dict[int, Tensor] = {}
        for tensor in names.values():
            if id(tensor) not in copies:
                whole = self._whole(tensor)
                kind = torch.float32 if whole.is_floating_point() else whole.dtype
                copies[id(tensor)] = whole.detach().to("cpu", kind, copy=True) if keep else torch.empty(0)
        return {name: copies[id(tensor)] for name, tensor in names.items()} if keep else None

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
        """Let go of DeepSpeed's buffers and hooks."""
        for hook in self._hooks:
            hook.remove()
        self._engine.destroy()

    def _fit(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self._dtype if value.is_floating_point() else None)

    def _watch(self, gradient: Tensor) -> None:
        # Looked at here, before DeepSpeed reduces, scatters and clips it: under ZeRO a rank sees only its own piece
        # later on, and the pieces are stepped one after the other.
        self._bad[1] += ~torch.isfinite(gradient).all()

    def _stop_if_not_finite(self) -> None:
        torch.distributed.all_reduce(self._bad)
        loss, gradient = self._bad.tolist()
        self._bad.zero_()
        if loss or gradient:
            raise NonFiniteError(
                f"the {'loss' if loss else 'gradient'} is not finite at optimizer step {self.steps + 1}, learning rate "
                f"{self.learning_rate:.3g}; no parameter was moved: lower the learning rate, clip gradients, or use "
                f"precision fp32"
            )

    def _plain_norm(self) -> float | None:
        # At stage 0 in fp32 DeepSpeed keeps no norm, but leaves the averaged gradients where torch has them.
        if self.config.zero_stage or self.config.precision != "fp32":
            return None
        gradients = [p.grad for p in self._module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def _whole(self, tensor: Tensor) -> Tensor:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        if not isinstance(tensor, nn.Parameter):
            return tensor
        if id(tensor) in self._masters:
            return self._masters[id(tensor)]
        master: Tensor | None = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
        if master is not None:
            return master
        if not hasattr(tensor, "ds_id"):
            return tensor
        with GatheredParameters([tensor]):
            return tensor.detach().clone()


def _masters(optimizer: Any) -> dict[int, Tensor]:
    # At stage 0 in bf16 or fp16 DeepSpeed keeps fp32 masters whole, beside the parameters; its own getter misses them.
    groups = zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True)
    return {id(p): master for low, high in groups for p, master in zip(low, high, strict=True)}


@contextmanager
def _exact_frequencies(module: nn.Module) -> Iterator[None]:
    """Keep rotary frequencies in fp32 through the conversion of a module.

    Rounded to bf16 they turn the embedding of position 500 by up to a whole radian, and the saved model, which
    computes them anew, would not be the one that was trained.
    """
    found = [(owner, owner._buffers.get("inv_freq")) for owner in module.modules()]
    kept = [(owner, exact.clone()) for owner, exact in found if exact is not None]
    yield
    for owner, exact in kept:
        owner._buffers["inv_freq"] = exact


def _groups(trained: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    parameters = list(trained)
    matrices = {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    groups = [group for group in (matrices, vectors) if group["params"]]
    if not groups:
        raise ClusterError("the model has no parameter to train: every one is frozen")
    return groups


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed, imported quietly and without what it would do on the side.

    Its autotuner, unused here, loads MLflow, which takes 2 seconds. For CPU ranks of one machine it compiles a
    shared-memory all-reduce, which takes half a minute and a C++ compiler; gloo does without either.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed
    finally:
        if absent:
            del sys.modules["mlflow"]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed
