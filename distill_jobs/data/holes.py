"""Tables that leave rows of their data out: a store whose other rows the teacher could not score.

A sample id says where a row lies in the data. In a part with holes it lies as many places earlier as rows before it
are left out, and which those are only the part's own ids tell.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Runs:
    """The rows of the data's part that a part holds, as runs of neighbours: R of them for R - 1 holes or more.

    Attributes:
        starts: [R] the first row of each run.
        places: [R + 1] where in the part each run starts, and the part's number of rows.
    """

    starts: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, sample_ids: np.ndarray, part: int, whole: int) -> Self | None:
        """The runs of a part's sample ids [rows]; None where ids of a part of ``whole`` rows can't be these."""
        rows = sample_ids - (part << 32)
        steps = np.diff(rows)
        if len(rows) and (rows[0] < 0 or rows[-1] >= whole or bool((steps < 1).any())):
            return None
        places = np.concatenate([[0], np.flatnonzero(steps > 1) + 1]) if len(rows) else np.empty(0, dtype=np.int64)
        return cls(rows[places], np.append(places, len(rows)))

    def where(self, rows: np.ndarray) -> np.ndarray:
        """Where in the part rows [n] of the data's part lie: [n] int64, -1 for those that it leaves out."""
        if not len(self.starts):
            return np.full(len(rows), -1, dtype=np.int64)
        run = np.searchsorted(self.starts, rows, side="right") - 1
        place = self.places[run] + rows - self.starts[run]
        return np.asarray(np.where((run >= 0) & (place < self.places[run + 1]), place, -1))
