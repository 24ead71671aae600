"""One process group for all tests of this folder: DeepSpeed keeps to the first one that a process has."""

from collections.abc import Iterator

import pytest
from loop_cases import one_rank


@pytest.fixture(scope="session")
def group() -> Iterator[None]:
    with one_rank():
        yield
