"""How the teacher's distribution is stored. A new codec is one file here and one line in ``CODECS``."""

from typing import TYPE_CHECKING, Any

from distill_jobs.errors import StoreError
from distill_jobs.store.codecs.base import Codec, Field, bytes_per_position
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.codecs.topk import TopKCodec

if TYPE_CHECKING:
    from distill_jobs import spec
    from distill_jobs.data.facts import DataFacts

CODECS: dict[str, type[Codec]] = {
    "dense": DenseCodec,
    "topk": TopKCodec,
    "sampled": SampledCodec,
    "hybrid": HybridCodec,
}

DENSE_UP_TO = 4096

__all__ = ["CODECS", "Codec", "Field", "bytes_per_position", "codec_from_plan", "make_codec"]


def make_codec(codec: "spec.Codec | None", facts: "DataFacts") -> Codec:
    """The codec of the spec; without one, ``dense`` for up to 4,096 targets and ``hybrid`` above."""
    if codec is not None:
        return CODECS[codec.kind](**codec.chosen.model_dump())
    return DenseCodec() if facts.targets <= DENSE_UP_TO else HybridCodec()


def codec_from_plan(values: Any) -> Codec:
    """The codec that a store's plan names.

    Raises:
        StoreError: no such codec, or its arguments don't fit.
    """
    arguments = dict(values) if isinstance(values, dict) else {}
    name = arguments.pop("name", None)
    known = isinstance(name, str) and name in CODECS
    sound = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in arguments.values())
    try:
        if not (known and sound):
            raise TypeError
        return CODECS[str(name)](**arguments)
    except TypeError:
        raise StoreError(
            f"the store's plan names the codec {values!r}, which this version does not know (it knows "
            f"{', '.join(CODECS)}): read it with the version that wrote it"
        ) from None
