"""Single columns, checked: numbers that are finite, text that can be read, labels that are among the classes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distill_jobs.data.rows import Column, Rows, row_error

NULL = "(null)"
_SHOWN = 8
_LARGEST = 1e100


def text_of(value: Any) -> str:
    """A category, class or slice value as text: 5, 5.0 and "5" are one, and a null is a value of its own."""
    if isinstance(value, str):
        return value
    if value is None:
        return NULL
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        if math.isnan(value):
            return NULL
        return str(int(value)) if float(value).is_integer() else repr(float(value))
    # pandas marks a missing value with NA or NaT, which equal nothing, not even themselves.
    return str(value) if _equals_itself(value) else NULL


def numbers(rows: Rows, name: str) -> np.ndarray:
    """A numeric column, [n] float64.

    Raises:
        DataError: names the first row whose value is null, not a number, NaN or infinite.
    """
    values = _fast_numbers(rows.columns[name])
    if values is None:
        values = np.array([_number(v, name, s) for v, s in zip(rows.values(name), rows.sources, strict=True)], float)
    # The bound keeps squares, and so the standard deviation, finite; comparing with NaN is false.
    usable = np.abs(values) < _LARGEST
    if not usable.all():
        at = int(np.flatnonzero(~usable)[0])
        raise row_error(rows.sources[at], f"numeric column {name} holds {values[at]}; numbers must be finite")
    return values


def texts(rows: Rows, name: str) -> list[str | None]:
    """A text column: strings, or None for a null.

    Raises:
        DataError: names the first row that holds something else or text that is not valid Unicode.
    """
    return [_string(v, name, s) for v, s in zip(rows.values(name), rows.sources, strict=True)]


def categories(rows: Rows, name: str) -> list[str]:
    """A column as text, a null as ``(null)``: for categorical features and slices."""
    return [text_of(value) for value in rows.values(name)]


def labels(rows: Rows, name: str) -> list[str]:
    """The label column as text; DataError names the first row without one."""
    found = [text_of(value) for value in rows.values(name)]
    if NULL in found:
        raise row_error(rows.sources[found.index(NULL)], f"the label {name} is missing")
    return found


def class_numbers(rows: Rows, name: str, classes: dict[str, int]) -> np.ndarray:
    """The label column as class numbers, [n] int64; DataError names the first row whose label is no class."""
    found = labels(rows, name)
    for label, source in zip(found, rows.sources, strict=True):
        if label not in classes:
            known = list(classes)
            shown = ", ".join(known[:_SHOWN]) + (f" … {len(known)} in all" if len(known) > _SHOWN else "")
            raise row_error(source, f"label {label!r} is not among the classes ({shown})")
    return np.array([classes[label] for label in found], dtype=np.int64)


def sorted_classes(found: Sequence[str]) -> tuple[str, ...]:
    """Classes in their order: by number where all are whole numbers, else by text."""
    if all(name.removeprefix("-").isdecimal() for name in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def _fast_numbers(column: Column) -> np.ndarray | None:
    if isinstance(column, list) or column.null_count:
        return None
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    return np.array(pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def _number(value: Any, name: str, source: str) -> float:
    if value is None:
        raise row_error(source, f"numeric column {name} is empty; fill missing numbers or drop the row")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise row_error(source, f"numeric column {name} holds {_short(value)}, which is not a number") from None


def _string(value: Any, name: str, source: str) -> str | None:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise row_error(source, f"column {name} is not UTF-8 text") from None
    if value is None:
        return None
    if not isinstance(value, str):
        raise row_error(source, f"column {name} holds {_short(value)}, which is not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise row_error(source, f"column {name} is not valid Unicode text") from None
    return value


def _equals_itself(value: Any) -> bool:
    try:
        return bool(value == value)
    except TypeError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
