"""Servers of object stores in processes of their own, as they are on a cluster: killed with the block that needs them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

_SECONDS = 30.0
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def moto(host: str = "127.0.0.1") -> Iterator[str]:
    """An S3 server that any process of this machine reaches; gives its endpoint."""
    with socket.create_server((host, 0)) as probe:
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("moto_server")
    command = [str(program), "-H", host, "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    endpoint, end = f"http://{host}:{port}", time.monotonic() + _SECONDS
    try:
        while True:
            assert server.poll() is None and time.monotonic() < end, "the S3 server did not start"
            try:
                urlopen(f"{endpoint}/moto-api/", timeout=1).close()
                break
            except (URLError, OSError):
                time.sleep(0.1)
        yield endpoint
    finally:
        server.kill()
        server.wait()


def environment(endpoint: str, **more: str) -> dict[str, str]:
    """What a process needs to work with the store at ``endpoint``."""
    return {**os.environ, **KEYS, "AWS_ENDPOINT_URL": endpoint, **more}
