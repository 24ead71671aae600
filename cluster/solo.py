"""A gang of one in this very process: for work that is one rank large, and started so often that a gang's start-up
would cost more than the work."""

import math
import os
import socket
from collections.abc import Callable
from typing import Any

import ray

from cluster.gang import Rank


class _Here:
    """What a rank leaves its reports with when the driver's side is in the same process."""

    def __init__(self, on_report: Callable[[dict[str, Any]], None]) -> None:
        self.report = on_report

    def asked(self) -> bool:
        return False

    def kept(self, left: bool = False) -> None:
        """Nobody counts what would be lost with it."""


def run_here(
    fn: Callable[[Rank, Any], Any], argument: Any, cpus: float, on_report: Callable[[dict[str, Any]], None]
) -> Any:
    """Call ``fn(rank, argument)`` as the only rank, on the device that this actor holds; again and again if wished.

    Args:
        on_report: called in ``fn``'s own thread; what it raises ends ``fn``.
    """
    import torch

    device = "cuda:0" if ray.get_gpu_ids() else "cpu"  # an actor is shown no devices but its own
    if not torch.distributed.is_initialized():
        _meet_alone("nccl" if device != "cpu" else "gloo")
    torch.set_num_threads(max(1, math.floor(cpus)))
    return fn(Rank(0, 1, device, _Here(on_report)), argument)


def _meet_alone(backend: str) -> None:
    import torch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "NODE_RANK": 0}
    os.environ.update({name: str(value) for name, value in alone.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.distributed.init_process_group(backend, init_method="env://", rank=0, world_size=1)
