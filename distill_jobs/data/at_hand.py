"""Models and tokenizers that lie in an object store: told apart without reading them, and brought here to be read."""

from cluster.errors import FileError
from cluster.faults import patiently
from cluster.files import Folder, digest, filesystem
from cluster.node_cache import node_copy
from distill_jobs.errors import ModelError

_WHOLE_FILE = (".gguf",)


def is_remote(where: str) -> bool:
    """Whether ``where`` is in an object store, and not a path or an id of Hugging Face."""
    return "://" in where


def stamps(where: str) -> dict[str, list[float]]:
    """Size in bytes and time of the last change (seconds) of a remote file, or of each directly in a remote folder.

    Reading some gigabytes at each start of a command, to see whether they have changed, would be worse than to take a
    file that was written again for a new one.

    Raises:
        ModelError: nothing is there.
    """
    folder, name = _place(where)
    system, root = filesystem(folder.uri)
    one = name and patiently(where, lambda: system.get_file_info(f"{root}/{name}"))
    found = [one] if one else folder.infos()
    known = {info.base_name: [float(info.size), info.mtime_ns / 1e9] for info in found if info.is_file}
    if not known:
        raise ModelError(f"there is nothing at {where}; correct the address, or upload the model there")
    return known


def at_hand(where: str) -> str:
    """The local path of what ``where`` names; what is remote is fetched, once for all processes of a node."""
    if not is_remote(where):
        return where
    folder, name = _place(where)
    try:
        copy = node_copy(folder, digest(stamps(where)), only=name)
    except FileError as error:
        raise ModelError(f"can't fetch {where}: {error}") from None
    return str(copy / name if name else copy)


def _place(where: str) -> tuple[Folder, str | None]:
    """The folder, and the name in it where a single file is meant."""
    if not where.endswith(_WHOLE_FILE):
        return Folder(where.rstrip("/")), None
    above, _, name = where.rpartition("/")
    return Folder(above), name
