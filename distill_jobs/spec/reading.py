"""The parts of a job spec that say which stores training reads, and how. Imports neither torch nor ray."""

from typing import Annotated

from pydantic import Field

from distill_jobs.spec.base import Part


class Mix(Part):
    """Another logit store to train from: its ``share`` of all samples, and its ``data`` where they hold its images."""

    store: str
    share: Annotated[float, Field(ge=0.001, lt=1.0)]
    data: str | None = None


class Reading(Part):
    """How training reads. Parts in an object store are fetched whole into ``cache_dir``, of at most ``cache_gb``.

    Rows in an object store are shuffled among ``window_parts`` parts at a time, which have to fit into the cache;
    local ones among all. ``verify`` checks each part the first time it is opened.
    """

    cache_dir: str | None = None
    cache_gb: Annotated[float, Field(gt=0)] = 16.0
    window_parts: Annotated[int, Field(gt=0)] = 8
    verify: bool = True
