"""Every row of the data once: in the store's part or in the part's quarantine, and never in both."""

from collections.abc import Iterator

import numpy as np


def uncovered(
    part: int, ids: np.ndarray, quarantined: np.ndarray, whole: int, source: np.ndarray | None
) -> Iterator[str]:
    """One sentence for each way in which a part and its quarantine fail to hold just the rows of the data's part.

    Args:
        ids: sample ids of the part's rows [rows], in their order.
        quarantined: sample ids of the rows in quarantine [n].
        whole: rows of the data's part.
        source: the data's own sample ids [whole], in their order; None where there are no data: then they are known
            by what sample ids are, the part's number and the row's.
    """
    if len(np.unique(ids)) < len(ids):
        yield f"part {part} holds a sample id twice"
    elif np.any(ids >> 32 != part):
        yield f"part {part} holds sample ids of another part"
    elif np.any(np.diff(ids) < 1):
        yield f"part {part} does not hold its rows in the order of their sample ids"
    both = np.intersect1d(ids, quarantined)
    if len(both):
        yield f"{len(both)} rows of part {part} are in the store and in the quarantine, the first is sample {both[0]}"
    wanted = source if source is not None else (part << 32) + np.arange(whole, dtype=np.int64)
    held = np.concatenate([ids, quarantined])
    missing, foreign = np.setdiff1d(wanted, held), np.setdiff1d(held, wanted)
    if len(missing):
        yield (
            f"{len(missing)} rows of part {part} are neither in the store nor in the quarantine, the first is sample "
            f"{missing[0]}"
        )
    if len(foreign):
        yield f"{len(foreign)} rows of part {part} are no rows of the data's, the first is sample {foreign[0]}"
    if source is not None and not np.array_equal(ids, source[~np.isin(source, quarantined)]):
        yield f"part {part} does not hold the rows of the data's part {part} in their order"
