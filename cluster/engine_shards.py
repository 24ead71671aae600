"""Where one rank holds the fp32 masters and AdamW's state of a model in training, at any ZeRO stage.

The only place that knows how DeepSpeed lays them out. What it offers is per parameter and flat, and is read and
written in place, so that nothing is sent between ranks to save or to restore it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MASTER, EMA = "master", "ema"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``start + length`` of a flat parameter; AdamW steps them at ``offset`` of ``owner``."""

    owner: Tensor
    offset: int
    start: int
    length: int


class Shards:
    """The fp32 masters, AdamW's moments and the moving average that this rank holds, by the parameter's name.

    Args:
        module: as DeepSpeed has it.
        engine: DeepSpeed's.
        stage: of ZeRO. At stage 0 every rank holds everything.
        ema: whether to keep a moving average; it begins as a copy of the masters.
    """

    def __init__(self, module: nn.Module, engine: Any, stage: int, ema: bool) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._engine, self.stage = engine, stage
        self._optimizer = engine.basic_optimizer
        found = {name: self._piece(p) for name, p in self.parameters.items()}
        self.pieces = {name: piece for name, piece in found.items() if piece is not None and piece.length > 0}
        self.owners = list({id(piece.owner): piece.owner for piece in found.values() if piece is not None}.values())
        self.keys = (MASTER, *_MOMENTS, *((EMA,) if ema else ()))
        self._begin(ema)

    def _piece(self, parameter: nn.Parameter) -> Piece | None:
        optimizer: Any = self._engine.optimizer
        if self.stage == 3:
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = length * torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
            real = min(length, parameter.ds_numel - start)  # type: ignore[attr-defined]  # the rest is padding
            return Piece(optimizer.fp32_partitioned_groups_flat[group], offset, start, real)
        if self.stage in (1, 2):
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                return None
            owner = self._optimizer.param_groups[mapping.param_group_index]["params"][0]
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            return Piece(owner, high.start, low.start, high.numel)
        return Piece(_twins(optimizer).get(id(parameter), parameter), 0, 0, parameter.numel())

    def _begin(self, ema: bool) -> None:
        # DeepSpeed begins at stage 0 in low precision with a step of zero gradients, which decays the weights and
        # counts for the bias correction; elsewhere torch would make the state at the first step.
        for low, high in _low_and_high(self._engine.optimizer, self.stage):
            high.data.copy_(low.data)
        fused = bool(self._optimizer.defaults.get("fused"))
        for owner in self.owners:
            state = self._optimizer.state[owner]
            state["step"] = torch.zeros((), dtype=torch.float32, device=owner.device if fused else "cpu")
            for key in _MOMENTS:
                state[key] = torch.zeros_like(owner, requires_grad=False)
            if ema:
                state[EMA] = owner.detach().clone()

    def read(self, name: str, key: str) -> Tensor:
        """This rank's piece of a parameter's master, moment or average, flat; it may share memory with it."""
        piece = self.pieces[name]
        return self._tensor(piece, key).detach().reshape(-1).narrow(0, piece.offset, piece.length)

    def write(self, name: str, key: str, values: Tensor) -> None:
        """Overwrite this rank's piece; ``publish`` then takes new masters into the module."""
        piece = self.pieces[name]
        whole = self._tensor(piece, key).detach()
        if piece.length == whole.numel():
            whole.copy_(values.view(whole.shape))
        else:
            whole.narrow(0, piece.offset, piece.length).copy_(values)

    def _tensor(self, piece: Piece, key: str) -> Tensor:
        found: Tensor = piece.owner if key == MASTER else self._optimizer.state[piece.owner][key]
        return found

    def whole(self, name: str, key: str, device: torch.device) -> Tensor:
        """A parameter's whole master, moment or average, in its shape and fp32; every rank must call."""
        parameter: Any = self.parameters[name]
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if self.stage == 0:
            return self.read(name, key).view(shape)
        full = torch.zeros(shape.numel(), device=device)
        if name in self.pieces:
            piece = self.pieces[name]
            full.narrow(0, piece.start, piece.length).copy_(self.read(name, key))
        torch.distributed.all_reduce(full)
        return full.view(shape)

    def count(self, name: str) -> int:
        """How often AdamW has stepped this rank's piece."""
        return int(self._optimizer.state[self.pieces[name].owner]["step"])

    def count_as(self, counts: Mapping[str, int]) -> None:
        """Set how often AdamW has stepped each parameter; of those that one flat tensor holds, the most."""
        for owner in self.owners:
            held = [counts[name] for name, piece in self.pieces.items() if piece.owner is owner]
            self._optimizer.state[owner]["step"].fill_(max(held, default=0))

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the average towards the masters."""
        averages = [self._optimizer.state[owner][EMA] for owner in self.owners]
        torch._foreach_lerp_(averages, [owner.detach() for owner in self.owners], 1.0 - decay)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchange masters and average, and take the new masters into the module; every rank must call."""
        for owner in self.owners:
            state = self._optimizer.state[owner]
            kept = owner.detach().clone()
            owner.detach().copy_(state[EMA])
            state[EMA] = kept
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Take changed masters into the module's parameters, as after a step; every rank must call."""
        optimizer = self._engine.optimizer
        for low, high in _low_and_high(optimizer, self.stage):
            low.data.copy_(high.data)
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer._partition_all_parameters()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
            optimizer.invalidate_secondary_tensor()


def _low_and_high(optimizer: Any, stage: int) -> list[tuple[Tensor, Tensor]]:
    # At stage 0 in bf16 or fp16 DeepSpeed keeps fp32 masters whole, beside the parameters.
    if stage or not hasattr(optimizer, "fp32_groups"):
        return []
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return [pair for low, high in groups for pair in zip(low, high, strict=True)]


def _twins(optimizer: Any) -> dict[int, Tensor]:
    return {id(low): high for low, high in _low_and_high(optimizer, 0)}


def scaler_of(optimizer: Any) -> Any:
    """DeepSpeed's loss scaler, or None where there is none."""
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def scaler_state(optimizer: Any) -> dict[str, float]:
    """What a loss scaler has come to, in plain numbers."""
    held = scaler_of(optimizer)
    return {name: getattr(held, name) for name in _SCALER if getattr(held, name, None) is not None}


def set_scaler(optimizer: Any, state: Mapping[str, float]) -> None:
    """Put a loss scaler where ``scaler_state`` found it."""
    held = scaler_of(optimizer)
    for name, value in state.items():
        if name in _SCALER and hasattr(held, name):
            setattr(held, name, value)
