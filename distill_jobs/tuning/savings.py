"""What it spared to ask the teacher once for all trials."""

from collections.abc import Sequence
from typing import Any

from cluster.meter import Usage
from cluster.sweep import Trial


def savings(capture_usd: float | None, store_rows: int, trials: Sequence[Trial]) -> dict[str, Any]:
    """The money that the one capture saved, by the ledger's price of it.

    Args:
        capture_usd: what the capture cost; None where the ledger doesn't know.
        store_rows: rows in the store.
        trials: of the student, those of the last round too; all of them were trained from the store.

    Returns:
        ``against_capture_each``: money saved against one capture for each training: (trainings - 1) × its price;
        ``against_live``: against a teacher that answers live, who works through each row as often as it is trained on:
        (rows trained / rows stored - 1) × its price, less than nothing where trials saw less than the store.
        ``low`` and ``high`` are null: this is arithmetic on one measured price.
    """
    rows = sum(Usage.of(trial.usage).rows for trial in trials)
    found = {"trainings": len(trials), "rows_trained": rows, "store_rows": store_rows, "capture_usd": capture_usd}
    if capture_usd is None or not store_rows:
        nothing = _alone(None, "the ledger has no entry of the capture")
        return {**found, "against_capture_each": nothing, "against_live": nothing}
    why = "worked out from one measured price"
    return {
        **found,
        "against_capture_each": _alone((len(trials) - 1) * capture_usd, why),
        "against_live": _alone((rows / store_rows - 1) * capture_usd, why),
    }


def _alone(value: float | None, why: str) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "level": 0.95, "why": why}
