"""Servers of object stores in processes of their own, as they are on a cluster, killed when their block ends."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

_SECONDS = 30.0
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


# The emulator answers one request after another, and its clients keep one open while they make the next: so it reads in
# threads, and writes one after another as it is made to.
_GCS = """
import http.server, sys, threading
from gcp_storage_emulator import server
server.server.HTTPServer = http.server.ThreadingHTTPServer
lock = threading.Lock()
def alone(answer):
    def call(handler):
        with lock:
            answer(handler)
    return call
for name in ("do_POST", "do_PUT", "do_PATCH", "do_DELETE"):
    setattr(server.RequestHandler, name, alone(getattr(server.RequestHandler, name)))
server.create_server(sys.argv[1], int(sys.argv[2]), in_memory=True).run()
"""


@contextmanager
def moto(host: str = "127.0.0.1") -> Iterator[str]:
    """An S3 server that any process of this machine reaches; gives its endpoint."""
    port = _free_port(host)
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", host, "-p", str(port)]
    with _serving(command, f"http://{host}:{port}") as endpoint:
        yield endpoint


@contextmanager
def gcs(host: str = "127.0.0.1") -> Iterator[str]:
    """A server of Google Cloud Storage's protocol; gives its endpoint."""
    port = _free_port(host)
    with _serving([sys.executable, "-c", _GCS, host, str(port)], f"http://{host}:{port}") as endpoint:
        yield endpoint


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def _serving(command: list[str], endpoint: str) -> Iterator[str]:
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + _SECONDS
    try:
        while True:
            assert server.poll() is None and time.monotonic() < end, f"{command[:2]} did not start"
            try:
                urlopen(endpoint, timeout=1).close()
                break
            except HTTPError:
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
