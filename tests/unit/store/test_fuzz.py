"""Any damage is seen by verify, and reading any store, corrupted or hostile, ends in StoreError or in right numbers."""

from pathlib import Path

import pytest
import torch
from damage_cases import GROUPS, KINDS, make_stores, prove
from fuzz_cases import Case, fuzz, limits, make_cases, read


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    made = make_cases(tmp_path_factory.mktemp("fuzz"))
    # What is imported or compiled once, is so before anything is watched.
    fuzz(made, range(-64, 0))
    return made


def run(cases: list[Case], numbers: range) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with limits() as code:
            ended = fuzz(cases, numbers)
    finally:
        torch.set_num_threads(threads)
    assert code == []
    print(ended)
    # Both ways out are taken, or the mutations would say nothing.
    assert ended["as it is: refused"] > len(numbers) / 10
    assert ended["resealed: refused"] > len(numbers) / 10 and ended["resealed: other numbers, sound"] > 0
    for case in cases:
        assert read(case)[0] is not None


def test_damaged_and_hostile_stores(cases: list[Case]) -> None:
    run(cases, range(2_000))


@pytest.mark.slow
@pytest.mark.timeout(7_200)
def test_many_damaged_and_hostile_stores(cases: list[Case]) -> None:
    run(cases, range(1_000_000, 1_200_000))


def test_all_damage_is_seen(tmp_path: Path) -> None:
    assert prove(make_stores(tmp_path), range(15)) == 15 * len(GROUPS) * len(KINDS)


@pytest.mark.slow
def test_far_more_damage_is_seen(tmp_path: Path) -> None:
    """Of each kind 250 times, to each group of files."""
    prove(make_stores(tmp_path), range(1_000, 1_250))
