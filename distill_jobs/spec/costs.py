"""The parts of a job spec that say what things cost, and what may be spent. Imports neither torch nor ray."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from distill_jobs.spec.base import Part, Positive

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Costs(Part):
    """Prices, electricity and the budget.

    ``prices`` is a price book of your own (a YAML file), ``override`` single prices over it. ``spot`` counts spot
    prices for all that the job holds, or by kind of device: {CPU: false, H100: true}. What a run leaves on disk is
    counted as kept for ``store_months``. ``country`` (three letters, ISO 3166) gives the electricity's kg CO2e per kWh,
    ``kg_co2e_per_kwh`` is one of your own; without either it is the world's average. ``pue`` is what the building draws
    for each watt of the machines. ``budget_usd`` is what the job's machines may cost: it stops before that is exceeded.
    The plan predicts for ``sizes`` times the actors and workers of the spec.
    """

    prices: str | None = None
    override: dict[str, float] = {}
    spot: bool | dict[str, bool] = False
    store_months: Amount = 1.0
    country: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] | None = None
    kg_co2e_per_kwh: Amount | None = None
    pue: Annotated[float, Field(ge=1, le=5)] = 1.0
    budget_usd: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 2, 4, 8)

    @model_validator(mode="after")
    def _one_intensity(self) -> Self:
        if self.country is not None and self.kg_co2e_per_kwh is not None:
            raise ValueError("costs.country and costs.kg_co2e_per_kwh both say how clean the electricity is: give one")
        return self

    def is_spot(self, device: str) -> bool:
        """Whether spot prices count for a kind of device: ``CPU``, or Ray's name of an accelerator."""
        return self.spot if isinstance(self.spot, bool) else self.spot.get(device, False)

    def inputs(self) -> dict[str, object]:
        """What the report depends on: of the settings that came later only those that are given."""
        tree = self.model_dump(mode="json", exclude={"budget_usd", "sizes"})
        later = self.model_dump(mode="json", exclude_defaults=True)
        return {name: value for name, value in tree.items() if name in ("prices", "override") or name in later}


class TeacherCost(Part):
    """What a teacher that is brought has cost, as its owner says; this job carries ``share`` of it."""

    usd: Amount = 0.0
    kwh: Amount = 0.0
    kg_co2e: Amount = 0.0
    share: Annotated[float, Field(ge=0, le=1)] = 1.0
