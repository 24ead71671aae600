"""Energy and carbon: what counters said counts as it is, and every estimate says that it is one, and from what."""

import logging
import os
import socket
from pathlib import Path

import pytest

from cluster.power import Part
from distill_jobs.costs.energy import CORE_WATTS, Grid, core_watts, country, energy_of, world_average
from distill_jobs.errors import SpecError
from distill_jobs.spec.costs import Costs


def test_what_was_measured_is_taken_as_it_is() -> None:
    kwh, measured, how = energy_of(Part("a", "H100", seconds=10.0, joules=7200.0, counter="nvml"))
    assert (kwh, measured, how) == (pytest.approx(0.002), True, "measured: nvml")


def test_a_virtual_processor_is_estimated_by_the_core() -> None:
    kwh, measured, how = energy_of(Part("a", "CPU", "AMD EPYC 7763 64-Core Processor", 0, 100.0, 50.0))
    assert (kwh, measured) == (pytest.approx(50 * CORE_WATTS / 3.6e6), False)
    assert how == "estimated: 4 W a core × processor time"


def test_a_known_processor_is_estimated_by_its_design_power() -> None:
    # 280 W by codecarbon's table, over the 128 threads of one.
    watts, said = core_watts("AMD EPYC 7763 64-Core Processor", 128)
    assert watts == pytest.approx(280 / 128) and said.startswith("280 W of AMD EPYC 7763")
    assert core_watts("Intel(R) Xeon(R) Platinum 8380 CPU @ 2.30GHz", 80)[0] == pytest.approx(270 / 80)
    assert core_watts("A Processor Nobody Sells", 8)[0] == CORE_WATTS


def test_accelerators_are_estimated_at_the_most_that_they_can_draw() -> None:
    kwh, measured, how = energy_of(Part("a", "H100", "NVIDIA H100 PCIe", 0, 3600.0))
    assert (kwh, measured) == (pytest.approx(0.35), False) and how == "estimated: 350 W of the board × time held"
    kwh, measured, how = energy_of(Part("a", "Abacus", seconds=3600.0))
    assert (kwh, measured) == (0.0, False) and how.startswith("not counted")


def test_the_carbon_of_electricity() -> None:
    assert world_average() == pytest.approx(0.475)
    assert 0.02 < country("FRA") < 0.1 < 0.5 < country("POL") < 1.0
    assert Grid.of(Costs()).source.startswith("the world's average")
    assert Grid.of(Costs(country="FRA", pue=1.4)) == Grid(country("FRA"), 1.4, "the mix of FRA (codecarbon)")
    assert Grid.of(Costs(kg_co2e_per_kwh=0.02)).kg_per_kwh == 0.02


def test_a_country_that_is_none_is_one_sentence() -> None:
    with pytest.raises(SpecError, match=r"costs\.country: nothing is known of the electricity of XXX"):
        Grid.of(Costs(country="XXX"))
    with pytest.raises(ValueError, match="give one"):
        Costs(country="FRA", kg_co2e_per_kwh=0.1)


def test_nothing_is_asked_of_the_network_written_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    Grid.of(Costs(country="DEU"))
    core_watts("A Processor Unheard Of", 4)
    assert os.listdir(tmp_path) == [] and capfd.readouterr() == ("", "")
    assert logging.getLogger("codecarbon").level == logging.CRITICAL
