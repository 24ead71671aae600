"""Encoded targets on their way from the device to a window's memory, beside the work on the next batch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_jobs.capture.scoring import Encoded


@dataclass
class Landing:
    """Targets that are being copied; ``land`` waits for them and puts them in their places."""

    encoded: Encoded
    host: dict[str, Tensor]
    wait: Callable[[], None]

    def land(self) -> None:
        """Put the targets in their places in the window, and note there which rows have none."""
        group = self.encoded.group
        self.wait()
        places = group.places()
        for name, values in self.host.items():
            # NumPy, as torch indexes few types of 16 bits.
            group.window.targets[name][places] = values.numpy()
        group.window.bad.update(self.encoded.bad)


class Transfer:
    """Starts copies to the host: on a GPU into page-locked memory, on a stream of their own.

    Attributes:
        depth: how many copies may be on their way.
    """

    def __init__(self, device: str) -> None:
        gpu = device.startswith("cuda")
        self.depth = 2 if gpu else 0
        self._stream = torch.cuda.Stream(device) if gpu else None  # type: ignore[no-untyped-call]

    def start(self, encoded: Encoded) -> Landing:
        """Copy without waiting."""
        stream = self._stream
        if stream is None:
            return Landing(encoded, encoded.columns, lambda: None)
        stream.wait_stream(torch.cuda.current_stream())
        host: dict[str, Tensor] = {}
        with torch.cuda.stream(stream):
            for name, values in encoded.columns.items():
                host[name] = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                host[name].copy_(values, non_blocking=True)
                # Its memory must not be given to the next batch before it has been read.
                values.record_stream(stream)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        encoded.columns = {}
        return Landing(encoded, host, done.synchronize)
