"""The client of an S3 object store: how often it asks again by itself, and when it takes silence for a fault."""

import os
from functools import lru_cache

from pyarrow import fs

from cluster.faults import patience

_SETTINGS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION")
_ATTEMPTS, _CONNECT_SECONDS = 3, 10.0


def client(bucket: str) -> fs.S3FileSystem:
    """The client for a bucket, at ``AWS_ENDPOINT_URL`` or else at Amazon; credentials come from the environment."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    return _client(endpoint, "" if endpoint else bucket, tuple(map(os.environ.get, _SETTINGS)), patience())


@lru_cache(maxsize=8)
def _client(
    endpoint: str | None,
    bucket: str,
    settings: tuple[str | None, ...],  # noqa: ARG001
    seconds: float,
) -> fs.S3FileSystem:
    """One client for the same endpoint and settings: making it takes longer than most requests."""
    scheme, _, host = endpoint.partition("://") if endpoint else ("https", "", None)
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
