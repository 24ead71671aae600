"""What ails the storage: faults that may pass, which are waited out for a while, and faults that need somebody's hand.

Every fault is one sentence. ``DISTILL_STORAGE_PATIENCE`` sets for how many seconds passing faults are waited out.
"""

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa

from cluster.errors import ClusterError, FileError, TransientFileError
from cluster.standing import STANDING

T = TypeVar("T")

_log = logging.getLogger(__name__)

_PATIENCE_SECONDS, _FIRST_PAUSE, _LONGEST_PAUSE = 60.0, 0.2, 10.0
_AGAIN = "run the same command again; what was committed stays valid"
_PASSING = {
    *(errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOLCK, errno.ENOBUFS),
    *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.EPIPE, errno.ESHUTDOWN),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENOTCONN),
    *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET),
}
_LASTING = {
    errno.ENOSPC: f"no space is left there; free some space and {_AGAIN}",
    errno.EDQUOT: f"the disk quota is used up; raise it or free some space and {_AGAIN}",
    errno.EFBIG: f"the file would be larger than the file system or a limit (ulimit -f) allows; raise it and {_AGAIN}",
    errno.EACCES: f"permission is missing; allow this user to read and write there and {_AGAIN}",
    errno.EPERM: f"permission is missing; allow this user to read and write there and {_AGAIN}",
    errno.EROFS: f"the file system is mounted read-only; make it writable and {_AGAIN}",
    errno.EMFILE: f"too many files are open; raise the limit (ulimit -n) and {_AGAIN}",
}
_AWS = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))?")
_AWS_PASSING = {
    *("SLOW_DOWN", "THROTTLING", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "NETWORK_CONNECTION", "REQUEST_TIMEOUT"),
    *("429", "408", "409", "500", "502", "503", "504", "509", "520", "522", "524", "529"),
}
_CREDENTIALS = (
    f"the object store does not accept the credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to valid ones "
    f"and {_AGAIN}"
)
_AWS_LASTING = {
    "ACCESS_DENIED": "the object store denied access; check the credentials, and that they may list, read, write and "
    f"delete there, and {_AGAIN}",
    "NO_SUCH_BUCKET": "there is no such bucket; create it, or correct the address",
    "507": f"no space is left there; free some space and {_AGAIN}",
    **dict.fromkeys(("INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID"), _CREDENTIALS),
    **dict.fromkeys(("UNRECOGNIZED_CLIENT", "MISSING_AUTHENTICATION_TOKEN", "ExpiredToken"), _CREDENTIALS),
    "QuotaExceeded": f"the quota is used up; raise it or free some space and {_AGAIN}",
}
# Google's client, and Azure's, which is told apart as its documents say: no server of theirs was at hand to try.
_GOOGLE = re.compile(r"google::cloud::Status\((\w+):")
_GOOGLE_PASSING = {"UNAVAILABLE", "INTERNAL", "ABORTED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNKNOWN"}
_GOOGLE_CREDENTIALS = (
    "the object store does not accept the credentials; set GOOGLE_APPLICATION_CREDENTIALS to a valid key file, or run "
    f"as a service account that may list, read, write and delete there, and {_AGAIN}"
)
_AZURE = re.compile(r"Azure Error: \[(\w*)\](?:\D{0,20}(\d{3})\b)?")
_AZURE_PASSING = {"ServerBusy", "InternalError", "OperationTimedOut", "RequestBodyIncomplete"}
# What libcurl says when no second try can help: an address, a certificate.
_NO_USE = re.compile(r"(?:curlCode: |CURL error \[)(3|51|58|60|77)\b")


def patience() -> float:
    """For how many seconds faults of the storage that may pass are waited out."""
    return float(os.environ.get("DISTILL_STORAGE_PATIENCE", _PATIENCE_SECONDS))


def patiently(where: str, call: Callable[[], T]) -> T:
    """Call until it succeeds, with longer and longer pauses, while its fault is one that may pass.

    Raises:
        TransientFileError: it still does so when patience has run out.
        FileError: a fault that time does not heal.
    """
    end, pause = None, _FIRST_PAUSE
    while True:
        try:
            with said(where):
                found = call()
        except TransientFileError as error:
            if end is None:
                _log.warning("%s; it is waited out for %.0f s", error, patience())
            # Many actors that meet the same fault must not come back all at once.
            wait = pause * random.uniform(0.5, 1.5)
            # From the first fault on: what took long until then may do so again.
            end = end or time.monotonic() + patience()
            if time.monotonic() + wait > end:
                raise
        else:
            if end is not None:
                STANDING.survived("storage_faults")
                _log.info("%s answers again", where)
            return found
        time.sleep(wait)
        pause = min(2 * pause, _LONGEST_PAUSE)


@contextmanager
def said(where: str) -> Iterator[None]:
    """Turn what the operating system or Arrow raises inside into a FileError or TransientFileError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise fault(where, error) from None


def pass_on(where: str, error: BaseException) -> None:
    """Raise TransientFileError if ``error`` is a fault that may pass: for whoever would take it for damage else."""
    if isinstance(error, pa.ArrowException | OSError):
        told = fault(where, error)
        if isinstance(told, TransientFileError):
            raise told from None


def fault(where: str, error: BaseException) -> ClusterError:
    """The error, of ours, that tells this one."""
    text, code = flat(error), getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError):
        return FileError(f"{where} is missing")
    aws = _AWS.search(text)
    if aws is not None:
        return _aws_fault(where, text, aws[2] if aws[1] == "UNKNOWN" and aws[2] else aws[1])
    google = _GOOGLE.search(text)
    if google is not None:
        return _google_fault(where, text, google[1])
    azure = _AZURE.search(text)
    if azure is not None and (azure[1] in _AZURE_PASSING or azure[2] in _AWS_PASSING):
        return TransientFileError(f"{where}: the object store fails or is too slow ({text})")
    if code in _LASTING:
        return FileError(f"{where}: {_LASTING[code]}")
    if code in _PASSING or isinstance(error, TimeoutError | ConnectionError):
        return TransientFileError(f"{where}: {text}")
    return FileError(f"{where}: {text}")


def _google_fault(where: str, text: str, code: str) -> ClusterError:
    if code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
        return FileError(f"{where}: {_GOOGLE_CREDENTIALS}")
    # Where its own patience is at an end, it says so and keeps the reason to itself.
    if code in _GOOGLE_PASSING and not _NO_USE.search(text):
        return TransientFileError(f"{where}: the object store fails or is too slow ({text[:200]})")
    return FileError(f"{where}: {text[:300]}")


def flat(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _aws_fault(where: str, text: str, code: str) -> ClusterError:
    for known, remedy in _AWS_LASTING.items():
        if known == code or f"ExceptionName: {known} " in text:
            return FileError(f"{where}: {remedy}")
    if code in _AWS_PASSING and not _NO_USE.search(text):
        return TransientFileError(f"{where}: the object store fails or is too slow ({text})")
    return FileError(f"{where}: {text}")
