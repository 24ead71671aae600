"""What layers of the teacher gave, beside the soft target: projected once for all by a fixed matrix, and quantised.

For each layer a position holds K integers and one scale. Shapes: N positions, H a layer's width, K stored numbers.
"""

import hashlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from distill_jobs.errors import SpecError, StoreError
from distill_jobs.store.codecs.base import Columns, Field

if TYPE_CHECKING:
    from distill_jobs import spec

_LEAST = 1e-30
"""Below this no number is told from 0: a scale must be a normal float32."""


@dataclass(frozen=True)
class FeatureCoding:
    """How features are stored: those of ``layers``, ``width`` numbers of ``bits`` each, by the matrices of ``seed``.

    A *scale* is a position's largest magnitude over 127 (of 8 bits; over 32,767 of 16), and each number is rounded to
    a multiple of it: off by half of it at most, that is by 1/254 of the position's largest. One scale a position, as
    positions differ in magnitude by far more than coordinates do once a random projection has mixed them.
    """

    layers: tuple[str, ...]
    width: int
    bits: int
    seed: int = 0

    @classmethod
    def of(cls, wanted: "spec.features.StoredFeatures | None") -> Self | None:
        """As the spec asks for; None where it doesn't."""
        return cls(**wanted.model_dump()) if wanted else None

    @classmethod
    def from_plan(cls, values: Any) -> Self | None:
        """As a store's plan has it; None where it has none. Raises StoreError where that is no such thing."""
        if values is None:
            return None
        try:
            layers = values["layers"]
            found = cls(**{**values, "layers": tuple(layers)})
            numbers = (found.width, found.bits, found.seed)
            sound = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
            named = bool(layers) and all(isinstance(name, str) for name in layers)
            if not (sound and named and found.width and found.bits in (8, 16) and found.as_plan() == values):
                raise TypeError
        except (TypeError, KeyError):
            raise StoreError(f"the store's plan has features that this version does not know: {values!r}") from None
        return found

    def as_plan(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return {**asdict(self), "layers": list(self.layers)}

    @property
    def top(self) -> int:
        """The largest integer; its negative is the least."""
        return (1 << (self.bits - 1)) - 1

    def fields(self, layers: tuple[str, ...] | None = None) -> dict[str, Field]:
        """The columns of some layers, by default of all: ``feature_<number>`` and its scale."""
        found: dict[str, Field] = {}
        for name in self.layers if layers is None else layers:
            number = self.layers.index(name)
            found[f"feature_{number}"] = Field(f"int{self.bits}", self.width)
            found[f"feature_{number}_scale"] = Field("float32", 1)
        return found

    @property
    def bytes_per_position(self) -> int:
        """Of all layers."""
        return sum(field.bytes for field in self.fields().values())

    def check_widths(self, widths: dict[str, int]) -> None:
        """Raise SpecError where a layer gives fewer numbers than are to be stored."""
        for name, width in widths.items():
            if width < self.width:
                raise SpecError(
                    f"capture.features.width is {self.width}, but the teacher's layer {name} gives only {width} "
                    f"numbers a position; lower the width"
                )

    def encode(self, layer: str, rows_NH: Tensor) -> Columns:
        """One layer's columns, on the device of ``rows_NH``; a row that isn't finite has a scale that isn't."""
        self.check_widths({layer: rows_NH.shape[1]})
        device = rows_NH.device
        with torch.autocast(device.type, enabled=False):
            projected = rows_NH.float() @ matrix(rows_NH.shape[1], self.width, f"{self.seed} {layer}").to(device)
        scale = projected.abs().amax(dim=1, keepdim=True) / self.top
        scale = scale.masked_fill(scale < _LEAST, 0.0)
        codes = (projected / scale.masked_fill(scale == 0, 1.0)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        codes = codes.masked_fill(scale == 0, 0.0).round_().clamp_(-self.top, self.top)
        number = self.layers.index(layer)
        return {f"feature_{number}": codes.to(getattr(torch, f"int{self.bits}")), f"feature_{number}_scale": scale}

    def broken(self, layer: str, columns: Columns) -> Tensor:
        """[N], where what the layer gave was not finite, of columns that ``encode`` made."""
        return ~torch.isfinite(columns[f"feature_{self.layers.index(layer)}_scale"][:, 0])

    def decode(self, columns: Columns) -> dict[str, Tensor]:
        """The features [N, K] in float32 of the layers whose columns are there."""
        found = {}
        for number, name in enumerate(self.layers):
            if f"feature_{number}" in columns:
                found[name] = columns[f"feature_{number}"].float() * columns[f"feature_{number}_scale"]
        return found

    def check(self, columns: Columns) -> None:
        """Refuse what no encoder writes: scales that are not finite or negative, integers that don't fit their scale.

        Raises:
            StoreError: naming the field.
        """
        for name in (f"feature_{number}" for number in range(len(self.layers))):
            if name not in columns:
                continue
            scale, codes = columns[f"{name}_scale"][:, 0], columns[name]
            if not bool((torch.isfinite(scale) & ((scale == 0) | (scale >= _LEAST))).all()):
                raise StoreError(f"the store is damaged: t.{name}_scale holds values that are no scales")
            low, high = (found.to(torch.int32) for found in codes.aminmax(dim=1))
            expected = torch.where(scale > 0, self.top, 0)
            if not torch.equal(torch.maximum(-low, high), expected.to(torch.int32)):
                raise StoreError(f"the store is damaged: t.{name} holds numbers that don't fit their position's scale")

    def rounding(self, columns: Columns) -> dict[str, float]:
        """How far off rounding leaves each layer: root mean square, as a share of the features' own.

        A number lies anywhere within its step alike, so that it is off by the step over √12.
        """
        found = {}
        for name, values in self.decode(columns).items():
            scale = columns[f"feature_{self.layers.index(name)}_scale"].double()
            power = values.double().square().mean()
            found[name] = float((scale.square().mean() / 12 / power.clamp(min=1e-60)).sqrt()) if len(values) else 0.0
        return found

    def told(self, columns: Columns) -> list[str]:
        """A line for each layer, for a person."""
        each = self.bytes_per_position // len(self.layers)
        return [
            f"{name}: {self.width} numbers of {self.bits} bits, off by {off:.2%}: {each:,} bytes a position"
            for name, off in self.rounding(columns).items()
        ]


@lru_cache(maxsize=64)
def matrix(inputs: int, outputs: int, seed: str) -> Tensor:
    """The projection [H, K] of H to K ≤ H numbers: K orthonormal directions drawn at random, times √(H/K).

    Scalar products, and so norms, angles and distances, come out as they were in expectation, and the closer the larger
    K is (Johnson and Lindenstrauss 1984; orthonormal directions after Choromanski, Rowland and Weller 2017). K = H is a
    rotation, and loses nothing. Drawn in float64 on the CPU: every actor has the same.
    """
    number = int.from_bytes(hashlib.blake2b(f"{seed} {inputs} {outputs}".encode(), digest_size=8).digest()) >> 1
    drawn = torch.randn(inputs, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    directions, triangle = torch.linalg.qr(drawn)
    # Without the signs, QR would not draw all directions alike.
    directions = directions * triangle.diagonal().sign()
    scaled: Tensor = directions * (inputs / outputs) ** 0.5
    return scaled.float()
