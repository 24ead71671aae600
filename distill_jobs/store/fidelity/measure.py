"""The measurement: every coding at the same held-back positions, and ``fidelity.json``, which says what came out."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from cluster.errors import FileError
from cluster.files import Folder, digest
from distill_jobs.errors import StoreError
from distill_jobs.models.scorer import Scorer
from distill_jobs.store.fidelity.codings import Coding, compared, family, of_codec
from distill_jobs.store.fidelity.compare import Kept, Softened, at_any_temperature, at_temperature
from distill_jobs.store.fidelity.held_back import RANDOM, Ask, Chunk, HeldBack
from distill_jobs.store.fidelity.summary import Gathered, whatever_temperature
from distill_jobs.store.fidelity.summary import at_temperature as means_at
from distill_jobs.store.plan import StorePlan

FIDELITY = "fidelity.json"
TEMPERATURES = (1.0, 2.0, 4.0)
MOST_SLICES = 30
_VERSION = 1

Progress = Callable[[int], None]


def codings_of(plan: StorePlan, references: bool) -> list[Coding]:
    """The store's own codec, our codecs at other sizes, and with ``references`` those of others."""
    own = of_codec(plan.make_codec(), plan.classes, own=True)
    others = [*family(plan.classes), *(compared(plan.classes) if references else [])]
    return [own, *(coding for coding in others if coding.name != own.name)]


def measure_store(
    plan: StorePlan,
    data: Folder,
    teacher: Scorer,
    *,
    positions: int,
    rows_at_once: int,
    device: str = "cpu",
    students: dict[str, Scorer] | None = None,
    thorough: bool = False,
    progress: Progress | None = None,
    ask: Ask | None = None,
) -> dict[str, Any]:
    """Measure the store's codec, and others beside it, where its teacher speaks of rows that were held back.

    Args:
        data: the prepared data that the store was made from.
        positions: how many to measure at; ``progress`` is told how many are done.
        students: trained students, whose logits give the gradient; one of fresh logits is always there.
        thorough: whether to measure all at every temperature, and other ways to store a teacher as well; else only the
            store's own codec is measured at more than T = 1.
        ask: asks the teacher; by default its own forward.

    Returns:
        what ``fidelity.json`` holds. Rows that the teacher can't score are left out, and counted.

    Raises:
        StoreError: there is nothing to measure on.
    """
    held = HeldBack(data, plan.make_facts(), positions, plan.seed)
    codings = codings_of(plan, references=thorough)
    chunks = held.chunks(teacher, students or {}, device, rows_at_once, ask)
    try:
        measured, count = measure(chunks, codings, TEMPERATURES if thorough else (1.0,), progress)
    except StoreError as error:
        raise StoreError(f"{error}; {held.left_out[0]}" if held.left_out else str(error)) from None
    page = {
        "version": _VERSION,
        "plan": plan.digest,
        "split": held.split,
        "positions": count,
        "rows_left_out": len(held.left_out),
        "classes": plan.classes,
        "students": [RANDOM, *(students or {})],
        "codings": measured,
    }
    return {**page, "digest": digest(page)}


@torch.inference_mode()
def measure(
    chunks: Iterable[Chunk],
    codings: Sequence[Coding],
    temperatures: Sequence[float] = TEMPERATURES,
    progress: Progress | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """What each coding gets wrong, in plain values, and at how many positions.

    A store's own codec is measured at all ``TEMPERATURES`` and by slice, the others at ``temperatures``. Memory is that
    of a chunk: of all positions only numbers stay.
    """
    truth, gathered = Gathered(), [Gathered() for _ in codings]
    slices: list[dict[str, np.ndarray]] = []
    students: list[str] = []
    count = 0
    for chunk in chunks:
        students, count = list(chunk.students), count + len(chunk.gold)
        _add(chunk, codings, temperatures, truth, gathered)
        slices.append(chunk.slices)
        if progress is not None:
            progress(count)
    if not count:
        raise StoreError("there are no scored positions to measure on")
    columns = {name: np.concatenate([piece[name] for piece in slices]) for name in slices[0]}
    made = []
    for coding, found in zip(codings, gathered, strict=True):
        entry = {"family": coding.family, "name": coding.name, "bytes": coding.bytes, "own": coding.own}
        entry |= whatever_temperature(found)
        at = TEMPERATURES if coding.own else temperatures
        entry["at"] = {f"{t:g}": means_at(found, truth, f"{t:g}", students) for t in at}
        if coding.own:
            entry["slices"] = _by_slice(found, truth, columns, students)
        made.append(entry)
    return made, count


def unmeasured(plan: StorePlan, reason: str) -> dict[str, Any]:
    """What ``fidelity.json`` holds where nothing could be measured; ``read`` takes it for none."""
    page = {"version": _VERSION, "plan": plan.digest, "positions": 0, "codings": [], "reason": reason}
    return {**page, "digest": digest(page)}


def why_unmeasured(store: Folder) -> str | None:
    """Why a store's fidelity could not be measured; None where it was, or nobody has tried."""
    page = _page(store)
    return str(page.get("reason") or "") or None if page else None


def read(store: Folder, plan: StorePlan | None = None) -> dict[str, Any] | None:
    """What ``fidelity.json`` of a store holds; None where there is none, or it is of another plan or damaged."""
    page = _page(store)
    return page if page and page["codings"] and (plan is None or page["plan"] == plan.digest) else None


def _page(store: Folder) -> dict[str, Any] | None:
    if not store.exists(FIDELITY):
        return None
    try:
        page = store.read_json(FIDELITY)
        sound = page["version"] == _VERSION and page["digest"] == digest(
            {k: v for k, v in page.items() if k != "digest"}
        )
    except (FileError, TypeError, KeyError, AttributeError):
        return None
    return dict(page) if sound else None


def numbers(page: dict[str, Any]) -> dict[str, float]:
    """The own codec's overall numbers under flat names, such as ``t1_gradient_random_error``: for the tracker."""
    own = next(entry for entry in page["codings"] if entry["own"])
    found: dict[str, Any] = {name: own[name] for name in ("bytes", "top1_kept", "gold_rank_kept")}
    found |= {f"log_partition_off_{name}": value for name, value in own["log_partition_off"].items()}
    for t, means in own["at"].items():
        for name, value in means.items():
            told = {f"_{what}": v for what, v in value.items()} if isinstance(value, dict) else {"": value}
            found |= {f"t{t}_{name.replace('/', '_')}{what}": v for what, v in told.items()}
    return {name: value for name, value in found.items() if value is not None}


def _add(
    chunk: Chunk, codings: Sequence[Coding], temperatures: Sequence[float], truth: Gathered, gathered: list[Gathered]
) -> None:
    logits = chunk.logits.float()
    kept = Kept.make(logits, chunk.gold)
    signals = [coding.signal(chunk.logits, chunk.gold, chunk.uniforms) for coding in codings]
    truth.add({"gold": chunk.gold})
    for signal, found in zip(signals, gathered, strict=True):
        found.add(at_any_temperature(signal, kept))
    for t in TEMPERATURES:
        softened = Softened.make(logits, chunk.students, t)
        truth.add({f"norm/{name}": norm for name, norm in softened.norms().items()}, f"{t:g}/")
        sums = {name: gradient.sum(dim=0, dtype=torch.float64) for name, gradient in softened.gradients.items()}
        truth.add_sums(sums, f"{t:g}/")
        for coding, signal, found in zip(codings, signals, gathered, strict=True):
            if coding.own or t in temperatures:
                values, summed = at_temperature(signal, softened, chunk.gold)
                found.add(values, f"{t:g}/")
                found.add_sums(summed, f"{t:g}/")


def _by_slice(
    found: Gathered, truth: Gathered, columns: dict[str, np.ndarray], students: list[str]
) -> dict[str, dict[str, Any]]:
    made: dict[str, dict[str, Any]] = {}
    for column, values in columns.items():
        # The largest first: of a column of many values the rest would be noise anyway.
        names, counts = np.unique(values, return_counts=True)
        made[column] = {}
        for index in np.argsort(-counts, kind="stable")[:MOST_SLICES]:
            where = values == names[index]
            at = {f"{t:g}": means_at(found, truth, f"{t:g}", students, where) for t in TEMPERATURES}
            overall = whatever_temperature(found, where)
            made[column][str(names[index])] = {"positions": int(counts[index]), **overall, "at": at}
    return made
