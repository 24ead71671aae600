"""One embedded Ray cluster of two CPUs for each test module."""

from collections.abc import Iterator

import pytest

from cluster.session import Session


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(cpus=2) as running:
        yield running
