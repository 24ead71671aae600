"""What all tests share: an object store that speaks the S3 protocol."""

from collections.abc import Callable, Iterator
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from cluster.files import Folder


@pytest.fixture(scope="module")
def s3() -> Iterator[Callable[[str], Folder]]:
    """Makes buckets in a moto server of the module's own, which the environment names for pyarrow's client."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # All servers of a process have one memory: another module's buckets are gone before this one's are made.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()

    def bucket(name: str) -> Folder:
        fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True).create_dir(name)
        return Folder(f"s3://{name}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield bucket
    server.stop()
