"""The price book: what a core-hour, an accelerator-hour and a gigabyte-month cost, in US dollars.

An hour has a price on demand, and may have a spot price: of machines that can be taken away at any moment. Where the
book has none, the price on demand counts in its place.

The book that ships beside this file holds list prices to their order of magnitude. A file of the user's is laid over
it, and single prices of the spec over both.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

import yaml

from cluster.errors import FileError
from cluster.files import Folder
from cluster.meter import Usage
from distill_jobs.costs.parts import CPU, OTHER, parts_of
from distill_jobs.errors import SpecError
from distill_jobs.spec.costs import Costs

_SINGLE = ("cpu_hour", "storage_gb_month")
_OF_A_PRICE = ("usd", "spot", "source")
_KEYS = ("as_of", *_SINGLE, "accelerator_hour")


@dataclass(frozen=True)
class PriceBook:
    """Prices in US dollars.

    Attributes:
        cpu_hour: one CPU core for an hour.
        storage_gb_month: 10⁹ bytes for a month.
        accelerator_hour: one accelerator for an hour, by Ray's name of its type; ``other`` for those not named.
        spot_hour: the spot prices, by Ray's name of the accelerator's type, and by ``CPU`` for a core.
        as_of: the time that the prices are of.
        changed: the prices that are not the shipped ones.
    """

    cpu_hour: float
    storage_gb_month: float
    accelerator_hour: dict[str, float]
    spot_hour: dict[str, float] = field(default_factory=dict)
    as_of: str = ""
    changed: tuple[str, ...] = ()

    @classmethod
    def load(cls, costs: Costs) -> "PriceBook":
        """The shipped book, the file ``costs.prices`` over it, and ``costs.override`` over both.

        Raises:
            SpecError: a file that can't be read, a key that isn't known, a price that is no number of 0 or more, a
                device of ``costs.spot`` in other letters than the book's.
        """
        text = resources.files(__package__).joinpath("prices.yaml").read_text(encoding="utf-8")
        book = cls(math.nan, math.nan, {})._with_file(text, "the shipped price book")
        book = replace(book, changed=())
        if costs.prices is not None:
            book = book._with_file(_read(costs.prices), costs.prices)
        for key, value in costs.override.items():
            book = book._with_price(key, value)
        meant = {name.lower(): name for name in (CPU, *book.accelerator_hour)}
        for device in costs.spot if isinstance(costs.spot, dict) else ():
            # Types that no book names may stand there too, so that only a slip can be told.
            if (name := meant.get(device.lower(), device)) != device:
                raise SpecError(f"costs.spot: there is no device {device}; did you mean {name}?")
        return book

    def accelerator_price(self, accelerator: str | None) -> float:
        """US dollars an hour for one accelerator; the price of ``other`` for a type that the book doesn't name."""
        return self.accelerator_hour.get(accelerator or OTHER, self.accelerator_hour[OTHER])

    def hour(self, device: str, spot: bool = False) -> float:
        """US dollars for a device for an hour: ``CPU`` is a core, any other an accelerator by Ray's name."""
        on_demand = self.cpu_hour if device == CPU else self.accelerator_price(device)
        known = device if device == CPU or device in self.accelerator_hour else OTHER
        return min(on_demand, self.spot_hour.get(known, on_demand)) if spot else on_demand

    def note(self, accelerator: str | None) -> str | None:
        """What to tell a user before money is spent, if the type isn't in the book; None if it is."""
        if accelerator in self.accelerator_hour:
            return None
        return (
            f"the price book doesn't name the accelerator {accelerator or '(type unknown)'}: it is counted at "
            f"${self.accelerator_hour[OTHER]:g} an hour; give yours as costs.override.{OTHER}_hour"
        )

    def money(
        self, usage: Usage, accelerator: str | None, is_spot: Callable[[str], bool] = lambda _device: False
    ) -> float:
        """US dollars for what was held: core-seconds and device-seconds at their hourly prices.

        Args:
            accelerator: what device-seconds count as where the usage doesn't name their type.
            is_spot: for which devices the spot price counts; see ``hour``.
        """
        held = parts_of(usage, accelerator)
        return math.fsum(part.seconds * self.hour(part.device, is_spot(part.device)) for part in held) / 3600.0

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
            "spot_hour": dict(self.spot_hour),
            "changed": list(self.changed),
        }

    def _with_price(self, key: str, value: Any) -> "PriceBook":
        spots = {f"{name}_spot_hour": name for name in self.accelerator_hour} | {"cpu_spot_hour": CPU}
        known = {*_SINGLE, *(f"{name}_hour" for name in self.accelerator_hour), *spots}
        if key not in known:
            raise SpecError(
                f"costs.override: there is no price {key}{_nearest(key, sorted(known))} (an accelerator that the book "
                f"doesn't name goes into the file that costs.prices gives)"
            )
        price = _price(value, f"costs.override.{key}")
        book = replace(self, changed=(*self.changed, key))
        if key in _SINGLE:
            return replace(book, **{key: price})  # type: ignore[arg-type]
        if key in spots:
            return replace(book, spot_hour={**self.spot_hour, spots[key]: price})
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
        # A price that is given anew leaves no spot price of the book's behind that might be the higher one.
        new = {CPU: tree.get("cpu_hour"), **{str(k): v for k, v in tree.get("accelerator_hour", {}).items()}}
        spots = {
            k: _price(v["spot"], f"{origin}: {k} spot") for k, v in new.items() if isinstance(v, dict) and "spot" in v
        }
        kept = {k: v for k, v in self.spot_hour.items() if new.get(k) is None}
        return replace(
            self,
            **single,  # type: ignore[arg-type]
            accelerator_hour={**self.accelerator_hour, **named},
            spot_hour={**kept, **spots},
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
        strange = [str(key) for key in value if key not in _OF_A_PRICE]
        if strange:
            raise SpecError(f"{where}: there is no key {strange[0]}{_nearest(strange[0], list(_OF_A_PRICE))}")
        value = value.get("usd")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise SpecError(f"{where} must be a price in US dollars, 0 or more (found {value!r})")
    return float(value)


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
