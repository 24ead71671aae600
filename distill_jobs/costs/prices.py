"""The price book: what a core-hour, an accelerator-hour and a gigabyte-month cost, in US dollars.

The book that ships beside this file holds list prices to their order of magnitude. A file of the user's is laid over
it, and single prices of the spec over both.
"""

import difflib
import math
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import yaml

from cluster.errors import FileError
from cluster.files import Folder
from cluster.meter import Usage
from distill_jobs.errors import SpecError
from distill_jobs.spec.parts import Costs

OTHER = "other"
_SINGLE = ("cpu_hour", "storage_gb_month")
_KEYS = ("as_of", *_SINGLE, "accelerator_hour")


@dataclass(frozen=True)
class PriceBook:
    """Prices in US dollars.

    Attributes:
        cpu_hour: one CPU core for an hour.
        storage_gb_month: 10⁹ bytes for a month.
        accelerator_hour: one accelerator for an hour, by Ray's name of its type; ``other`` for those not named.
        as_of: the time that the prices are of.
        changed: the prices that are not the shipped ones.
    """

    cpu_hour: float
    storage_gb_month: float
    accelerator_hour: dict[str, float]
    as_of: str = ""
    changed: tuple[str, ...] = ()

    @classmethod
    def load(cls, costs: Costs) -> "PriceBook":
        """The shipped book, the file ``costs.prices`` over it, and ``costs.override`` over both.

        Raises:
            SpecError: a file that can't be read, a key that isn't known, a price that is no number of 0 or more.
        """
        text = resources.files(__package__).joinpath("prices.yaml").read_text(encoding="utf-8")
        book = cls(math.nan, math.nan, {})._with_file(text, "the shipped price book")
        book = replace(book, changed=())
        if costs.prices is not None:
            book = book._with_file(_read(costs.prices), costs.prices)
        for key, value in costs.override.items():
            book = book._with_price(key, value)
        return book

    def accelerator_price(self, accelerator: str | None) -> float:
        """US dollars an hour for one accelerator; the price of ``other`` for a type that the book doesn't name."""
        return self.accelerator_hour.get(accelerator or OTHER, self.accelerator_hour[OTHER])

    def note(self, accelerator: str | None) -> str | None:
        """What to tell a user before money is spent, if the type isn't in the book; None if it is."""
        if accelerator in self.accelerator_hour:
            return None
        return (
            f"the price book doesn't name the accelerator {accelerator or '(type unknown)'}: it is counted at "
            f"${self.accelerator_hour[OTHER]:g} an hour; give yours as costs.override.{OTHER}_hour"
        )

    def money(self, usage: Usage, accelerator: str | None) -> float:
        """US dollars for what was held: core-seconds and device-seconds at their hourly prices.

        Args:
            accelerator: what device-seconds count as where the usage doesn't name their type.
        """
        cores = usage.core_seconds * self.cpu_hour
        named = usage.by_accelerator
        devices = math.fsum(seconds * self.accelerator_price(name) for name, seconds in named.items())
        devices += max(0.0, usage.device_seconds - math.fsum(named.values())) * self.accelerator_price(accelerator)
        return (cores + devices) / 3600.0

    def storage(self, size: float, months: float = 1.0) -> float:
        """US dollars for keeping ``size`` bytes for ``months``."""
        return size / 1e9 * months * self.storage_gb_month

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the report and the tracker."""
        return {
            "as_of": self.as_of,
            "cpu_hour": self.cpu_hour,
            "storage_gb_month": self.storage_gb_month,
            "accelerator_hour": dict(self.accelerator_hour),
            "changed": list(self.changed),
        }

    def _with_price(self, key: str, value: Any) -> "PriceBook":
        known = {*_SINGLE, *(f"{name}_hour" for name in self.accelerator_hour)}
        if key not in known:
            raise SpecError(
                f"costs.override: there is no price {key}{_nearest(key, sorted(known))} (an accelerator that the book "
                f"doesn't name goes into the file that costs.prices gives)"
            )
        price = _price(value, f"costs.override.{key}")
        book = replace(self, changed=(*self.changed, key))
        if key in _SINGLE:
            return replace(book, **{key: price})  # type: ignore[arg-type]
        return replace(book, accelerator_hour={**self.accelerator_hour, key.removesuffix("_hour"): price})

    def _with_file(self, text: str, origin: str) -> "PriceBook":
        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpecError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("accelerator_hour", {}), dict):
            raise SpecError(
                f"{origin} must be a mapping with keys such as cpu_hour and accelerator_hour: {{H100: 2.5}}"
            )
        for key in tree:
            if key not in _KEYS:
                raise SpecError(f"{origin}: there is no price {key}{_nearest(str(key), list(_KEYS))}")
        single = {name: _price(tree[name], f"{origin}: {name}") for name in _SINGLE if name in tree}
        named = {
            str(name): _price(value, f"{origin}: accelerator_hour.{name}")
            for name, value in tree.get("accelerator_hour", {}).items()
        }
        return replace(
            self,
            **single,  # type: ignore[arg-type]
            accelerator_hour={**self.accelerator_hour, **named},
            as_of=str(tree.get("as_of", self.as_of)),
            changed=(*self.changed, *single, *(f"{name}_hour" for name in named)),
        )


def _read(uri: str) -> str:
    parent, _, name = uri.rpartition("/")
    try:
        return (Folder(parent or "/")).read(name).decode()
    except FileError as error:
        raise SpecError(f"can't read the prices: {error}; check costs.prices") from None
    except UnicodeDecodeError:
        raise SpecError(f"can't read the prices: {uri} is not UTF-8 text") from None


def _price(value: Any, where: str) -> float:
    if isinstance(value, dict):
        strange = [str(key) for key in value if key not in ("usd", "source")]
        if strange:
            raise SpecError(f"{where}: there is no key {strange[0]}{_nearest(strange[0], ['usd', 'source'])}")
        value = value.get("usd")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise SpecError(f"{where} must be a price in US dollars, 0 or more (found {value!r})")
    return float(value)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
