"""Energy and kg CO2e: what counters have measured, and an estimate, told as one, where they have not.

codecarbon's tables give the power of processors and the carbon of a country's electricity. Only its tables are used:
its tracker would ask the network where it is, and write files of its own.
"""

import functools
import logging
import re
from dataclasses import dataclass
from typing import Any

from cluster.peak import board_watts
from cluster.power import Part
from distill_jobs.costs.parts import CPU
from distill_jobs.errors import SpecError
from distill_jobs.spec.costs import Costs

CORE_WATTS = 4.0
"""Of a core whose processor isn't known, as codecarbon has it."""

_JOULES = 3.6e6


@dataclass(frozen=True)
class Grid:
    """The electricity that a job uses.

    Attributes:
        kg_per_kwh: kg CO2e of a kWh.
        pue: what the building draws for each watt of the machines.
        source: where ``kg_per_kwh`` is from.
    """

    kg_per_kwh: float
    pue: float
    source: str

    @classmethod
    def of(cls, costs: Costs) -> "Grid":
        """The spec's.

        Raises:
            SpecError: ``costs.country`` is none that the tables have.
        """
        if costs.kg_co2e_per_kwh is not None:
            return cls(costs.kg_co2e_per_kwh, costs.pue, "costs.kg_co2e_per_kwh")
        if costs.country is None:
            return cls(world_average(), costs.pue, "the world's average (codecarbon); give costs.country")
        return cls(country(costs.country), costs.pue, f"the mix of {costs.country} (codecarbon)")


def world_average() -> float:
    """kg CO2e of a kWh, on average over the world."""
    return float(_tables().get_carbon_intensity_per_source_data()["world_average"]) / 1000.0


def country(code: str) -> float:
    """kg CO2e of a kWh in a country, by its three letters (ISO 3166).

    Raises:
        SpecError: the tables don't have it.
    """
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata

    tables = _tables()
    if code not in tables.get_global_energy_mix_data():
        raise SpecError(f"costs.country: nothing is known of the electricity of {code}; give costs.kg_co2e_per_kwh")
    place = GeoMetadata(country_iso_code=code, country_name=code)
    return float(Emissions(tables).get_country_emissions(Energy.from_energy(kWh=1.0), place))


def energy_of(part: Part) -> tuple[float, bool, str]:
    """The energy of a part: kWh at the machine, whether it was measured, and how it is known.

    Measured: what the counters said. Else for processors (watts of a core) × (processor time burnt), the watts being
    the processor's thermal design power by its threads; for accelerators (the board's watts by its data sheet) × (time
    held), which is the most that it can be.
    """
    if part.counter:
        return part.joules / _JOULES, True, f"measured: {part.counter}"
    if part.device == CPU:
        watts, said = core_watts(part.model, part.threads)
        return watts * part.busy_seconds / _JOULES, False, f"estimated: {said} × processor time"
    board = board_watts(part.model or part.device) or board_watts(part.device)
    if board is None:
        return 0.0, False, f"not counted: the power of {part.model or part.device} isn't known"
    return board * part.seconds / _JOULES, False, f"estimated: {board:g} W of the board × time held"


@functools.cache
def core_watts(model: str, threads: int) -> tuple[float, str]:
    """Watts of a busy core, and what that is from.

    Args:
        model: the processor's name as the machine tells it.
        threads: of one processor; 0 on a virtual machine, where that isn't known.
    """
    known = _design_power(model) if threads else None
    if known is None:
        return CORE_WATTS, f"{CORE_WATTS:g} W a core"
    return known / threads, f"{known:g} W of {model} by its {threads} threads"


def _design_power(model: str) -> float | None:
    """The thermal design power of a processor: that of the longest name in the table all of whose words are in it."""
    said = _words(model)
    table = _tables().get_cpu_power_data()
    found = [
        (len(words), float(watts))
        for name, watts in zip(table["Name"], table["TDP"], strict=True)
        if (words := _words(str(name))) <= said and any(re.search(r"\d", word) for word in words)
    ]
    return max(found)[1] if found else None


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w-]+", re.sub(r"\(r\)|\(tm\)", " ", text.lower())))


@functools.cache
def _tables() -> Any:
    from codecarbon.input import DataSource

    # It says at every look-up what it doesn't know; what matters of that stands in the ledger.
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    return DataSource()
