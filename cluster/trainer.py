"""Ray Train, trimmed to what a gang needs: half of its start-up is spent on what a gang never uses.

``TorchTrainer`` imports torch in the controller, which never touches a tensor, and starts an actor that splits Ray
Data sets, of which there are none. Measured on 2 cores, a gang of one rank starts in 6 s instead of 12 s without them.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import ray.train
from ray.train.backend import Backend, BackendConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_TIMEOUT = timedelta(minutes=30)


@dataclass
class TorchRendezvous(BackendConfig):  # type: ignore[misc]  # Ray is untyped
    """Has the ranks meet in one torch process group; torch is imported by the ranks alone."""

    backend: str = "gloo"

    @property
    def backend_cls(self) -> type[Backend]:
        return _Rendezvous


class _Rendezvous(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True  # so that nccl finds its peers on the same machine

    def on_start(self, worker_group: Any, backend_config: TorchRendezvous) -> None:
        host, port = worker_group.execute_single(0, _free_address)
        count = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(rank, _meet, backend_config.backend, host, port, rank, count)
                for rank in range(count)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: TorchRendezvous) -> None:  # noqa: ARG002
        # The processes end now. Leaving the group in order would wait for a rank that may be dead.
        return


class GangTrainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer without the helpers that a gang has no use for.

    Should Ray rename a method, the gang merely starts as slowly as before, and fails and grows as Ray has it.

    Attributes:
        embedded: whether the cluster ends with the driver.
        policies: what to take in place of Ray's, by the name of the controller's argument.
    """

    embedded = False
    policies: dict[str, Any] | None = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(**{**arguments, **(self.policies or {})})

    def _create_default_callbacks(self) -> list[Any]:
        # The cleaner frees a dead controller's devices for others; an embedded cluster has no others.
        spared = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if self.embedded else set())
        return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in spared]


def _free_address() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _meet(backend: str, host: str, port: int, rank: int, count: int) -> None:
    context = ray.train.get_context()
    places = {
        "RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "NODE_RANK": context.get_node_rank(),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in places.items()})
    if backend == "gloo" and (card := interface(ray.util.get_node_ip_address())) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", card)
    import torch

    if backend == "nccl":
        torch.cuda.set_device(_cuda_index())
    torch.distributed.init_process_group(backend, init_method="env://", rank=rank, world_size=count, timeout=_TIMEOUT)


def interface(address: str) -> str | None:
    """The network interface of this machine that has an IP address; None where none has.

    Gloo would take the one that the machine's name stands for, in many a container the loopback, which no other node
    reaches. The address by which Ray reaches a node is one that the others can reach it by. NCCL is left to choose: it
    takes the loopback last, and may use several interfaces at once (``NCCL_SOCKET_IFNAME`` names others).
    """
    for name, found in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in found):
            return name
    return None


def device() -> str:
    """This rank's device: ``cuda:<index>`` where its gang holds GPUs, else ``cpu``."""
    return f"cuda:{_cuda_index()}" if ray.get_gpu_ids() else "cpu"


def _cuda_index() -> int:
    # Ray shows each rank the devices of all ranks on its machine; its own is one of them.
    mine = str(ray.get_gpu_ids()[0])
    shown = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return shown.index(mine) if mine in shown else 0
