"""Whose fault it is that a model failed: some row's, memory's, the device's, or that of something else."""

from enum import Enum

import torch

from cluster.errors import ClusterError
from distill_jobs.errors import CaptureError, DistillError

_NO_ROOM = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
_DEVICE = ("CUDA error", "CUDA driver error", "device-side assert", "CUBLAS_STATUS", "CUDNN_STATUS", "NCCL")


class Fault(Enum):
    """Whose fault an exception is."""

    ROW = "of some row"
    MEMORY = "of a batch that is too large"
    DEVICE = "of the device, which this process can't use any more"
    OTHER = "of the machine or of the job as a whole"


def fault_of(error: BaseException) -> Fault:
    """Judge an exception that came out of a model, or out of a codec that took its logits."""
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Fault.MEMORY
    if isinstance(error, RuntimeError) and any(sign in text for sign in _NO_ROOM):
        return Fault.MEMORY
    # After one of these every later call fails as well, whatever it is about: rows can't be told apart any more.
    if isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _DEVICE)
    ):
        return Fault.DEVICE
    if isinstance(error, CaptureError):
        return Fault.ROW
    if isinstance(error, OSError | ClusterError | DistillError):
        return Fault.OTHER
    return Fault.ROW if isinstance(error, Exception) else Fault.OTHER
