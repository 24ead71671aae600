"""Cluster's own errors: a small tree, picklable (one message each), so that they cross process boundaries whole."""

import os


class ClusterError(Exception):
    """Something went wrong where the work runs. The message says what, where, and what to do."""

    exit_code = 1


class ResourceError(ClusterError):
    """More was asked of the cluster than it has."""

    exit_code = 2


class LeaseError(ClusterError):
    """Somebody else is at work in the same folder."""

    exit_code = 2


class JobError(ClusterError):
    """A Ray job can't be submitted, found or stopped as asked."""

    exit_code = 2


class FileError(ClusterError):
    """A file could not be read or written."""


class TransientFileError(ClusterError):
    """A fault of the storage that may pass: the same call can succeed when it is made again.

    It is no FileError, so that nobody who takes an unreadable file for a damaged one takes this for it.
    """


class ShardError(ClusterError):
    """A shard failed more often than its retries allow."""


class GangError(ClusterError):
    """A gang of ranks failed."""


class Regroup(Exception):
    """No error: a gang ends because it is to begin again with another number of ranks."""


class TrackingError(ClusterError):
    """The MLflow server could not be reached or refused."""


class NonFiniteError(ClusterError):
    """A loss or gradient was not finite; the optimizer has not moved."""


class CheckpointError(ClusterError):
    """The saved state of a training run is incomplete, damaged or of another model."""


def one_line(error: BaseException) -> str:
    """An unforeseen error in one line: type, text, and the file and line that raised it."""
    trace, place = error.__traceback__, ""
    while trace is not None:
        place = f" ({os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
