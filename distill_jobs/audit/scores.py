"""The scored rows of an evaluation, read back: which arms there are, which rows belong together, what they sum to."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa

from cluster.files import Folder
from distill_jobs.data.table import MANIFEST
from distill_jobs.errors import NotReadyError

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Scores:
    """One entry a piece (see ``score``): P pieces, S seeds of an arm.

    Attributes:
        columns: the columns of the evaluation, [P] or [P, BINS].
        arms: the models of each role, in the order of their seeds: ``teacher``, ``student``, ``baseline``, ``gate-…``.
    """

    columns: Columns
    arms: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, columns: Columns) -> Self:
        names = [name.removesuffix(".nll") for name in columns if name.endswith(".nll")]
        arms: dict[str, tuple[str, ...]] = {}
        for name in sorted(names, key=_by_seed):
            role = name.partition("/")[0]
            arms[role] = (*arms.get(role, ()), name)
        return cls(columns, arms)

    @classmethod
    def read(cls, folder: Folder) -> Self:
        """All parts of a complete evaluation."""
        tables = []
        for name in folder.read_json(MANIFEST)["part_files"]:
            if name is not None:
                with folder.open(name) as stream:
                    tables.append(pa.ipc.open_file(stream).read_all())
        whole = pa.concat_tables(tables)
        return cls.of({name: _numpy(whole[name].combine_chunks()) for name in whole.column_names})

    @property
    def language(self) -> bool:
        return "document" in self.columns

    @property
    def positions(self) -> np.ndarray:
        """Scored positions of each piece, [P] float64."""
        return self.columns["positions"].astype(np.float64)

    @property
    def students(self) -> dict[str, tuple[str, ...]]:
        """The arms that learnt: all but the teacher."""
        return {role: names for role, names in self.arms.items() if role != "teacher"}

    @property
    def units(self) -> np.ndarray | None:
        """The document of each piece, [P] of text; None where every piece is a unit of its own."""
        return self.columns.get("document")

    def of_arm(self, role: str, what: str) -> np.ndarray:
        """A column of every seed of an arm, [P, S] float64."""
        return np.stack([self.of_model(name, what) for name in self.arms[role]], axis=1)

    def of_model(self, name: str, what: str) -> np.ndarray:
        """A sum of one model, [P] float64: one of ``SUMS``, ``agree_right``, ``repeats`` …

        Raises:
            NotReadyError: an earlier release evaluated, and did not keep it.
        """
        column = self.columns.get(f"{name}.{what}")
        if column is None:
            raise NotReadyError(f"the evaluation holds no {what} of {name}: an earlier release made it; evaluate again")
        return np.asarray(column, dtype=np.float64)


def rows_of(columns: Columns, chosen: np.ndarray | slice = slice(None)) -> int:
    """How many rows of the data stand behind (some of) the pieces."""
    return len(np.unique(columns["sample_id"][chosen]))


def _by_seed(name: str) -> tuple[str, int]:
    role, _, seed = name.partition("/")
    return role, int(seed or 0)


def _numpy(column: Any) -> np.ndarray:
    if isinstance(column, pa.FixedSizeListArray):
        return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(column), -1)
    return np.asarray(column.to_numpy(zero_copy_only=False))
