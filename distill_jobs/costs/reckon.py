"""From what a stage used to its entry in the ledger: money, energy, carbon and MFU, by node and kind of device."""

import math
import time
from dataclasses import asdict
from functools import cached_property
from typing import Any

from cluster.meter import Usage
from cluster.peak import peak_flops
from cluster.power import Part
from distill_jobs.costs.energy import Grid, energy_of
from distill_jobs.costs.ledger import Entry, Kind, PartCost, mfu
from distill_jobs.costs.parts import CPU, parts_of
from distill_jobs.costs.prices import PriceBook
from distill_jobs.spec.costs import Costs, TeacherCost

STORAGE, DECLARED = "storage", "teacher/declared"


class Reckoner:
    """The prices, and the electricity, of one job.

    Raises:
        SpecError: a price, or ``costs.country``, is wrong.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs, self.prices = costs, PriceBook.load(costs)
        if costs.country is not None:
            self.grid  # noqa: B018  # a wrong one is told at once

    def money(self, usage: Usage, accelerator: str | None) -> float:
        """US dollars for what was held."""
        return self.prices.money(usage, accelerator, self.costs.is_spot)

    def entry(
        self,
        stage: str,
        usage: Usage,
        accelerator: str | None,
        started: float,
        ended: float,
        *,
        size: int = 0,
        kind: Kind = "measured",
        precision: str = "bf16",
    ) -> Entry:
        """What a stage used, reckoned.

        Args:
            accelerator: what device-seconds count as where the usage doesn't name their type.
            size: bytes that the stage left on disk.
            precision: what its models were computed in; its peak is what MFU is a share of.
        """
        held = parts_of(usage, accelerator)
        found = [self._part(part) for part in held]
        parts, measured = [part for part, _ in found], [part.kwh for part, counted in found if counted]
        kinds = sorted({part.device for part in held if part.device != CPU})
        possible = _possible(held, precision)
        return Entry(
            stage,
            usage,
            math.fsum(part.usd for part in parts),
            ", ".join(kinds) or None,
            started,
            ended,
            size,
            kind,
            usd_on_demand=self.prices.money(usage, accelerator),
            usd_spot=self.prices.money(usage, accelerator, lambda _device: True),
            usd_month=self.prices.storage(size),
            kwh=math.fsum(part.kwh for part in parts),
            kwh_measured=math.fsum(measured),
            kg_co2e=math.fsum(part.kg_co2e for part in parts),
            flops_possible=possible,
            parts=tuple(parts),
            **mfu(usage.flops, possible, bool(kinds)),
        )

    def storage(self, entries: list[Entry]) -> Entry:
        """What keeping all that the stages left costs, for ``costs.store_months``; its energy isn't known."""
        usd = math.fsum(entry.usd_month for entry in entries) * self.costs.store_months
        now = time.time()
        return Entry(
            STORAGE, Usage(), usd, None, now, now, kind="storage", usd_on_demand=usd, usd_spot=usd,
            mfu_why="nothing is computed",
        )  # fmt: skip

    def declared(self, cost: TeacherCost) -> Entry:
        """This job's share of what a teacher that was brought has cost, as its owner says."""
        usd, now = cost.usd * cost.share, time.time()
        return Entry(
            DECLARED, Usage(), usd, None, now, now, kind="declared", usd_on_demand=usd, usd_spot=usd,
            kwh=cost.kwh * cost.share, kg_co2e=cost.kg_co2e * cost.share, mfu_why="declared, not measured",
        )  # fmt: skip

    @cached_property
    def grid(self) -> Grid:
        """The electricity; looked up when it is first needed, since reading its tables takes a second."""
        return Grid.of(self.costs)

    def told(self) -> dict[str, Any]:
        """The electricity, for the ledger."""
        return asdict(self.grid)

    def _part(self, part: Part) -> tuple[PartCost, bool]:
        at_machine, measured, how = energy_of(part)
        kwh, hours = at_machine * self.grid.pue, part.seconds / 3600.0
        usd = hours * self.prices.hour(part.device, self.costs.is_spot(part.device))
        cost = PartCost(part.node, part.device, part.model, hours, usd, kwh, kwh * self.grid.kg_per_kwh, how)
        return cost, measured


def _possible(parts: tuple[Part, ...], precision: str) -> float:
    """Floating-point operations that the accelerators could have done while held; 0 where one's peak isn't known."""
    possible = 0.0
    for part in parts:
        if part.device == CPU:
            continue
        peak = peak_flops(part.model, precision) or peak_flops(part.device, precision)
        if peak is None:
            return 0.0
        possible += peak * part.seconds
    return possible
