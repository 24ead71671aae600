"""The measurement made again, from the teacher and the data that lie beside a store in its workdir; without Ray."""

from typing import Any

from cluster.files import Folder
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import StoreError
from distill_jobs.models.files import SERVING, model_digest, read_serving
from distill_jobs.models.place import device_for, load_placed
from distill_jobs.models.scorer import Scorer
from distill_jobs.store.fidelity.measure import FIDELITY, Progress, measure_store, read
from distill_jobs.store.plan import StorePlan, check_student, check_teacher, workdir_of

_TOKENS_AT_ONCE = 1024
_SEEDS = 64


def fidelity_of(
    store: Folder, positions: int, student: Folder | None = None, progress: Progress | None = None
) -> tuple[dict[str, Any], bool]:
    """Measure again and write ``fidelity.json``; where teacher or data are gone, read what was measured at capture.

    Args:
        positions: how many to measure at.
        student: a trained student's model; by default the first one of the workdir, if there is one.

    Returns:
        what ``fidelity.json`` holds, and whether it was measured just now.

    Raises:
        StoreError: there is neither anything to measure with nor anything measured; or the teacher is another.
        VocabularyError: the student doesn't fit the store.
        ModelError, DataError: what lies there is damaged.
    """
    plan, workdir = StorePlan.load(store), workdir_of(store)
    teacher, data = workdir / "teacher" / "model", workdir / "data"
    if not teacher.exists(SERVING) or not data.exists("manifest.json"):
        page = read(store, plan)
        if page is None:
            raise StoreError(
                f"nothing was measured when {store} was captured, and its teacher and data are not beside it: "
                "run this in the workdir that the store was made in"
            )
        return page, False
    check_teacher(plan, model_digest(teacher), DataFacts.load(data))
    device = device_for(1)
    students = {name: _student(folder, plan, device) for name, folder in _students(workdir, student).items()}
    page = measure_store(
        plan,
        data,
        load_placed(teacher, device, "auto"),
        positions=positions,
        rows_at_once=max(1, _TOKENS_AT_ONCE // plan.positions_per_row),
        device=device,
        students=students,
        thorough=True,
        progress=progress,
    )
    store.write_json(FIDELITY, page)
    return page, True


def _students(workdir: Folder, given: Folder | None) -> dict[str, Folder]:
    if given is not None:
        return {"student": given}
    seeds = (seed for seed in range(_SEEDS) if (workdir / f"student/{seed}/model").exists(SERVING))
    return {f"student/{seed}": workdir / f"student/{seed}/model" for seed in list(seeds)[:1]}


def _student(folder: Folder, plan: StorePlan, device: str) -> Scorer:
    serving, facts = read_serving(folder)
    check_student(plan, serving["outputs"], facts.tokenizer_sha)
    return load_placed(folder, device, "auto")
