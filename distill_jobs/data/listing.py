"""What a table's manifest lists of its parts, checked before a reader builds on it."""

from typing import Any

import numpy as np


def check_listing(facts: Any) -> None:
    """Raise TypeError, KeyError or AttributeError unless all that the reader builds on is as it should be."""
    rows, files, sums, size = (facts[name] for name in ("part_rows", "part_files", "part_sha256", "rows_per_batch"))
    out = facts.get("part_quarantined", [])
    # A row's number within its part has 32 bits (``sample_id``).
    whole = all(_count(n) for n in rows) and _count(size) and size > 0 and len(rows) == len(files) == len(sums)
    whole = whole and isinstance(out, list) and len(out) in (0, len(rows)) and all(_count(n) for n in out)
    safe = all(f is None or (f.startswith("part-") and "/" not in f and "\0" not in f) for f in files)
    told = all(isinstance(s, str) for s in sums)
    if not (whole and safe and told) or any((f is None) != (n == 0) for f, n in zip(files, rows, strict=True)):
        raise TypeError


def left_out(facts: dict[str, Any]) -> np.ndarray:
    """Rows of the data's part of the same number that each part leaves out, [parts] int64."""
    return np.asarray(facts.get("part_quarantined") or [0] * len(facts["part_rows"]), dtype=np.int64)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32
