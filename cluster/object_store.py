"""Object stores: their clients, how often these ask again by themselves, and how an object comes to be.

Where the store is and who asks is said by the environment alone, so that neither stands in a spec, a manifest or a log
(STORAGE.md lists the variables).
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache

import pyarrow as pa
from pyarrow import fs

from cluster.errors import FileError
from cluster.faults import patience

_S3_SETTINGS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"),
    *("AWS_DEFAULT_REGION", "AWS_REGION"),
)
_GCS_SETTINGS = ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT")
_ATTEMPTS, _CONNECT_SECONDS = 3, 10.0
_BLOCK, _IN_FLIGHT = 8 << 20, 8


def client(scheme: str, bucket: str) -> fs.FileSystem:
    """The client for a bucket of S3 or Google Cloud Storage.

    ``AWS_ENDPOINT_URL_S3`` or ``AWS_ENDPOINT_URL`` name an S3 endpoint other than Amazon's, ``STORAGE_EMULATOR_HOST``
    one that speaks Google's protocol.
    """
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return _s3(endpoint, "" if endpoint else bucket, _environment(_S3_SETTINGS), patience())
    return _gcs(_environment(_GCS_SETTINGS), patience())


def check_address(uri: str) -> None:
    """Refuse an address that says more than where a file is: it is written into specs, manifests and logs.

    Raises:
        FileError: it holds settings or a login.
    """
    scheme, _, path = uri.partition("://")
    login = path.partition("/")[0].rpartition("@")[0]
    if ":" in login or (login and scheme in ("s3", "gs", "gcs")):
        raise FileError(f"an address in {scheme}:// holds a login; credentials come from the environment only")
    if "endpoint_override=" in path or "access_key=" in path or "secret_key=" in path:
        raise FileError(
            f"{uri.partition('?')[0]}: settings behind a ? are not taken; the endpoint comes from AWS_ENDPOINT_URL or "
            "STORAGE_EMULATOR_HOST, credentials from the environment"
        )


def upload(system: fs.FileSystem, path: str, source: pa.NativeFile) -> None:
    """Make an object of what ``source`` holds, from its beginning: in one request, or in parts where it is large.

    Closing the stream is what makes the object, whether all has been written or not, and a signal's handler may raise
    between any two lines. So a thread does it, which no signal reaches, and which is waited for.
    """

    def send() -> None:
        blocks = _Blocks(source)
        try:
            write(blocks)
        finally:
            # What could not be read to its end has been made an object all the same.
            if blocks.broken:
                system.delete_file(path)

    def write(blocks: Iterable[bytes]) -> None:
        # By default Arrow would compress what has a name such as x.gz.
        with system.open_output_stream(path, compression=None) as sink:
            for number, block in enumerate(blocks, 1):
                sink.write(block)
                # What is read faster than it is sent would all lie in memory.
                if number % _IN_FLIGHT == 0:
                    sink.flush()

    with ThreadPoolExecutor(1, thread_name_prefix="upload") as pool:
        pool.submit(send).result()


class _Blocks:
    """The blocks of a local file from its beginning; ``broken`` when one of them could not be read."""

    def __init__(self, source: pa.NativeFile) -> None:
        self._source, self.broken = source, False

    def __iter__(self) -> Iterator[bytes]:
        try:
            self._source.seek(0)
            while block := self._source.read(_BLOCK):
                yield block
        except GeneratorExit:
            raise
        except BaseException:
            self.broken = True
            raise


def _environment(names: tuple[str, ...]) -> tuple[str | None, ...]:
    return tuple(map(os.environ.get, names))


@lru_cache(maxsize=8)
def _s3(
    endpoint: str | None,
    bucket: str,
    settings: tuple[str | None, ...],  # noqa: ARG001
    seconds: float,
) -> fs.S3FileSystem:
    """One client for the same endpoint and settings: making it takes longer than most requests."""
    scheme, _, host = endpoint.rstrip("/").partition("://") if endpoint else ("https", "", None)
    return fs.S3FileSystem(
        endpoint_override=host,
        scheme=scheme,
        region=None if endpoint else fs.resolve_s3_region(bucket),
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
        connect_timeout=min(_CONNECT_SECONDS, seconds),
        # A transfer is given up when not a byte of it has moved for so long.
        request_timeout=max(1.0, seconds / 2),
        # A small file is one request then, and not three.
        allow_delayed_open=True,
    )


@lru_cache(maxsize=8)
def _gcs(settings: tuple[str | None, ...], seconds: float) -> fs.GcsFileSystem:
    emulator, _, project = settings
    scheme, _, host = (emulator or "").rstrip("/").rpartition("://")
    return fs.GcsFileSystem(
        # An emulator knows nobody; else Google's own search for credentials finds the file, or the machine's account.
        anonymous=emulator is not None,
        endpoint_override=host or None,
        scheme=scheme or ("http" if emulator else "https"),
        retry_time_limit=timedelta(seconds=max(1.0, seconds / 2)),
        project_id=project,
    )
