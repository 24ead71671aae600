"""What a job reads from this machine, packed so that it can travel with the job; and unpacked where the job runs.

Small files go along, and are put into the workdir as ``inputs/<digest>/…``, where every node finds them, and a job that
is submitted again finds the same ones. What is in an object store, or larger, stays where it is.
"""

import glob
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.files import Folder

# Set in the environment of a job that was submitted: its id, and the token of a lease whose owner is known to be gone.
JOB, DEAD_LEASE = "DISTILL_JOB", "DISTILL_DEAD_LEASE"
INPUTS = "inputs"
MOST_BYTES = 64 << 20

# Where a spec names files or folders that are read; a list stands for each of its entries.
PLACES = (
    "data.train",
    "data.validation",
    "data.test",
    "data.features.documents.tokenizer",
    "data.features.text.tokenizer",
    "teacher.model.hf",
    "teacher.model.gguf",
    "teacher.model.saved",
    "student.model.hf",
    "student.model.gguf",
    "student.model.saved",
    "distill.mix[].store",
    "distill.mix[].data",
    "distill.teachers[].store",
    "distill.teachers[].data",
    "costs.prices",
)


@dataclass(frozen=True)
class Local:
    """What a setting names on this machine: the files, each with the path that it keeps below its new folder."""

    setting: str
    place: str
    files: Mapping[str, Path]
    bytes: int

    @property
    def digest(self) -> str:
        """Of names and content."""
        found = hashlib.sha256()
        for name, path in sorted(self.files.items()):
            with path.open("rb") as file:
                found.update(f"{name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return found.hexdigest()[:12]


def places(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings of a spec that name something to read, and what each names."""
    for setting in PLACES:
        for holder, key, name in _holders(tree, setting):
            value = holder.get(key)
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, str):
                    yield name, each


def replaced(tree: dict[str, Any], moved: Mapping[str, str]) -> None:
    """Put the new places where the old ones stand."""
    for setting in PLACES:
        for holder, key, _ in _holders(tree, setting):
            value = holder.get(key)
            if isinstance(value, str):
                holder[key] = moved.get(value, value)
            elif isinstance(value, list):
                holder[key] = [moved.get(each, each) for each in value]


def local(setting: str, place: str) -> Local | None:
    """What lies at ``place`` on this machine; None where nothing does."""
    if "://" in place:
        return None
    root = Path(place)
    if root.is_file():
        files = {root.name: root}
    elif root.is_dir():
        files = {f"{root.name}/{path.relative_to(root)}": path for path in sorted(root.rglob("*")) if path.is_file()}
    else:
        base = Path(_fixed(place))
        found = [Path(name) for name in sorted(glob.glob(place, recursive=True))] if base != root else []
        files = {str(path.relative_to(base)): path for path in found if path.is_file()}
    return Local(setting, place, files, sum(path.stat().st_size for path in files.values())) if files else None


def pack(tree: dict[str, Any], workdir: str, folder: Path) -> None:
    """Copy what a spec reads from this machine into ``folder``, and name in ``tree`` the places where it will lie.

    The smallest come first, as long as they are ``MOST_BYTES`` together; what is left keeps its place.
    """
    found = [each for setting, place in places(tree) if (each := local(setting, place)) is not None]
    taken, moved = 0, {}
    for each in sorted(found, key=lambda each: each.bytes):
        taken += each.bytes if each.place not in moved else 0
        if taken > MOST_BYTES:
            break
        digest = each.digest
        for name, path in each.files.items():
            target = folder / INPUTS / digest / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        moved[each.place] = f"{workdir.rstrip('/')}/{INPUTS}/{digest}/{_kept(each)}"
    replaced(tree, moved)


def code_of(tree: dict[str, Any], here: Path) -> list[Path]:
    """The modules of factories that lie in the folder ``here``: a file or a package each."""
    found = []
    for role in ("teacher", "student"):
        factory = (tree[role]["model"] or {}).get("factory")
        if factory:
            name = factory["target"].partition(":")[0].partition(".")[0]
            found += [path for path in (here / f"{name}.py", here / name) if path.exists()]
    return sorted(set(found))


def copy(path: Path, folder: Path) -> None:
    """Copy a file, or a package without what Python has made of it, into ``folder``."""
    if path.is_dir():
        shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(path, folder / path.name)


def unpack(folder: Path, workdir: Folder) -> None:
    """Put what has travelled in ``folder`` into the workdir; what is there already stays."""
    packed = folder / INPUTS
    for path in sorted(packed.rglob("*")) if packed.is_dir() else ():
        if path.is_file():
            name = f"{INPUTS}/{path.relative_to(packed)}"
            # Its folder's name is its digest, so that one that is there is the same.
            if not workdir.exists(name):
                workdir.write(name, path.read_bytes())


def _kept(found: Local) -> str:
    """What is left of a place below its new folder: the file's or folder's name, or the pattern."""
    root = Path(found.place)
    return root.name if root.exists() else str(root.relative_to(_fixed(found.place)))


def _fixed(place: str) -> str:
    """The folder that a glob begins in."""
    return re.split(r"[*?\[]", place, maxsplit=1)[0].rpartition("/")[0] or "/"


def _holders(tree: Any, setting: str) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Where in a tree a setting stands: the mapping, its key there, and its name with the numbers of list entries."""
    *steps, key = setting.split(".")
    nodes = [(tree, "")]
    for step in steps:
        name = step.removesuffix("[]")
        below: list[tuple[Any, str]] = []
        for node, path in nodes:
            value = node.get(name) if isinstance(node, dict) else None
            if step.endswith("[]"):
                below += [(each, f"{path}{name}.{i}.") for i, each in enumerate(value or [])]
            else:
                below.append((value, f"{path}{name}."))
        nodes = below
    yield from ((node, key, f"{path}{key}") for node, path in nodes if isinstance(node, dict))
