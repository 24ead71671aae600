"""What a module needs before DeepSpeed takes it over: an optimizer, recomputed layers, frequencies kept exact."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cluster.engine_config import EngineConfig
from cluster.errors import ClusterError, ResourceError


def build_optimizer(module: nn.Module, config: EngineConfig) -> torch.optim.AdamW:
    """AdamW over what ``module`` trains; biases, the parameters of norm layers and other vectors don't decay.

    torch's own, as DeepSpeed's fused optimizers are compiled on first use, for which a user's machine may lack a
    compiler. Its fused kernel takes a quarter of the plain one's time, on CPUs too.

    Raises:
        ClusterError: nothing is to be trained.
        ResourceError: the fused kernel was asked for and does not serve the device.
    """
    if config.optimizer != "adamw":
        try:
            return torch.optim.AdamW(_groups(module, config.weight_decay), lr=config.learning_rate_at(0), fused=True)
        except RuntimeError as error:
            if config.optimizer == "adamw_fused":
                raise ResourceError(f"optimizer: adamw_fused does not serve this device ({error}); use adamw") from None
    return torch.optim.AdamW(_groups(module, config.weight_decay), lr=config.learning_rate_at(0))


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    owners = [(owner, name, p) for owner in module.modules() for name, p in owner.named_parameters(recurse=False)]
    trained = {id(p): p for _, _, p in owners if p.requires_grad}
    spared = {
        id(p) for owner, name, p in owners if p.ndim < 2 or "norm" in type(owner).__name__.lower() or name == "bias"
    }
    decaying = {"params": [p for p in trained.values() if id(p) not in spared], "weight_decay": weight_decay}
    others = {"params": [p for p in trained.values() if id(p) in spared], "weight_decay": 0.0}
    groups = [group for group in (decaying, others) if group["params"]]
    if not groups:
        raise ClusterError("the model has no parameter to train: every one is frozen")
    return groups


def _is_norm(owner: nn.Module) -> bool:
    # By the name of its class: every architecture of transformers brings a norm of its own.
    return "norm" in type(owner).__name__.lower()


class _Recomputed:
    """A layer whose activations are not kept from the forward pass but computed again in the backward pass."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        plain = super().__call__  # type: ignore[misc]
        if self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            # The whole call, hooks included: under ZeRO-3 they bring the layer's parameters once more.
            return checkpoint(plain, *inputs, use_reentrant=False, **named)
        return plain(*inputs, **named)


def recompute(module: nn.Module) -> None:
    """Activation checkpointing: of a transformers model by its own means, else over the outermost stack of layers.

    Raises:
        ResourceError: the model has no layers of which that could be done.
    """
    for part in module.modules():
        if getattr(part, "supports_gradient_checkpointing", False):
            part.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            return
    layers = next((found for part in module.modules() if (found := _layers_of(part))), None)
    if layers is None:
        raise ResourceError(
            "activation_checkpointing: the model has no stack of layers (nn.ModuleList or nn.Sequential of modules "
            "that have parts of their own) to compute twice; leave it false"
        )
    for layer in layers:
        layer.__class__ = type(type(layer).__name__, (_Recomputed, type(layer)), {})


def _layers_of(part: nn.Module) -> list[nn.Module]:
    """The children of a stack that are worth it: blocks, not single operations, whose input is all they'd keep."""
    if not isinstance(part, (nn.ModuleList, nn.Sequential)):
        return []
    blocks = [child for child in part if any(True for _ in child.children()) and any(True for _ in child.parameters())]
    return blocks if len(blocks) > 1 else []


@contextmanager
def exact_frequencies(module: nn.Module) -> Iterator[None]:
    """Keep rotary frequencies in fp32 through the conversion of a module.

    Rounded to bf16 they turn the embedding of position 500 by up to a whole radian, and the saved model, which
    computes them anew, would not be the one that was trained.
    """
    found = [(owner, owner._buffers.get("inv_freq")) for owner in module.modules()]
    kept = [(owner, exact.clone()) for owner, exact in found if exact is not None]
    yield
    for owner, exact in kept:
        owner._buffers["inv_freq"] = exact


def import_deepspeed(device: torch.device) -> Any:
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
