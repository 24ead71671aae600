"""Set damaged parts of a store aside, so that the next capture makes them, and only them, again."""

from cluster.errors import FileError
from cluster.files import Folder, sha256
from distill_jobs.data.table import MANIFEST, PartRecord, read_record, record_name
from distill_jobs.errors import DataError, StoreError
from distill_jobs.store.plan import PARTS, PLAN, StorePlan, refuse_cold
from distill_jobs.store.quarantine import read_quarantine
from distill_jobs.store.reader import open_parts, read_manifest


def repair(folder: Folder) -> list[int]:
    """Take away the commit records of the parts whose files are not the ones that were written, and what vouches for
    the whole: from then on the store counts as incomplete, and a capture makes what is missing.

    A damaged plan or manifest is taken away too; a capture writes both anew and keeps every sound part.

    Returns:
        the numbers of the parts; empty where all is as it was written, and then nothing is touched.

    Raises:
        StoreError: the store is archived.
    """
    refuse_cold(folder)
    found = sorted(part for part in _recorded(folder / PARTS) if not _sound(folder, part))
    if not found and _vouched_for(folder):
        return []
    # What says that the store is complete goes first: killed in between, it is merely incomplete.
    for where in (folder, folder / PARTS):
        where.remove(MANIFEST)
    for part in found:
        (folder / PARTS).remove(record_name(part))
    if not _planned(folder):
        folder.remove(PLAN)
    return found


def _recorded(parts: Folder) -> list[int]:
    names = (name.removeprefix("part-").removesuffix(".json") for name in parts.names(".json"))
    return [int(number) for number in names if number.isdecimal()]


def _sound(folder: Folder, part: int) -> bool:
    try:
        record = read_record(folder / PARTS, part)
        return record is not None and record.part == part and _as_written(folder, record)
    except (DataError, StoreError, FileError):
        return False


def _as_written(folder: Folder, record: PartRecord) -> bool:
    read_quarantine(folder, record)
    return record.file is None or sha256(folder / PARTS, record.file) == record.sha256


def _planned(folder: Folder) -> bool:
    try:
        StorePlan.load(folder)
    except StoreError:
        return False
    return True


def _vouched_for(folder: Folder) -> bool:
    """Whether plan and manifests are whole and of one another, or the store is merely not complete yet."""
    try:
        plan = StorePlan.load(folder)
        if not folder.exists(MANIFEST):
            return True
        table = open_parts(folder, plan, read_manifest(folder, plan), verify=False)
        files = [name for name in table.facts["part_files"] if name is not None]
        return len(_recorded(folder / PARTS)) == table.parts and all((folder / PARTS).exists(name) for name in files)
    except (StoreError, DataError, FileError):
        return False
