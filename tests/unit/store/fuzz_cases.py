"""Mutations of small stores: of any file, with the checksums left as they are or made right again by a hostile hand."""

import hashlib
import json
import os
import random
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from store_cases import lm_facts, make_data, make_store, table_facts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from cluster.files import Folder, digest
from distill_jobs.data.facts import DataFacts
from distill_jobs.data.table import sample_id
from distill_jobs.errors import StoreError
from distill_jobs.store.codecs import Codec
from distill_jobs.store.codecs.dense import DenseCodec
from distill_jobs.store.codecs.hybrid import HybridCodec
from distill_jobs.store.codecs.sampled import SampledCodec
from distill_jobs.store.codecs.topk import TopKCodec
from distill_jobs.store.inspect import describe, render
from distill_jobs.store.reader import LogitStore
from distill_jobs.store.signal import TeacherSignal
from distill_jobs.store.verify import verify
from distill_jobs.store.writer import SEAL, seal

WIDE = 70_000  # Class ids of 17 bits.
ROOM = 1 << 30  # Bytes that reading a damaged store may take beyond what reading a whole one does.
STORES: dict[str, tuple[DataFacts, Codec]] = {
    "dense": (lm_facts(rows=4), DenseCodec()),
    "topk": (lm_facts(rows=4), TopKCodec(6)),
    "sampled": (lm_facts(rows=4), SampledCodec(8)),
    "hybrid": (lm_facts(rows=4), HybridCodec(6, 4)),
    "hybrid, wide": (lm_facts(rows=4, vocabulary=WIDE), HybridCodec(6, 4)),
    "a table": (table_facts(rows=40), DenseCodec()),
    "with holes": (lm_facts(rows=8), HybridCodec(6, 4)),
}
_HOLES = {"with holes": [sample_id(0, 1), sample_id(0, 3), sample_id(1, 0)]}
_NUMBERS = [-1, 0, 1, 2, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**40, 2**61, 2**63, 2**64, 10**30, 1e308, -0.5]
_OTHERS: list[Any] = [None, True, "", "x", "../../x", [], {}, [[]], float("nan"), "part-00000.json", "\ud800"]
_WORDS = [0, 1, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
_CODE = ("exec", "compile", "os.system", "subprocess.Popen", "pickle.find_class", "marshal.loads", "ctypes.dlopen")


@dataclass
class Case:
    """A store on disk, what its files hold, and the numbers that reading it gives."""

    name: str
    root: Path
    files: dict[str, bytes]
    numbers: list[Any] = field(default_factory=list)

    @property
    def folder(self) -> Folder:
        return Folder(str(self.root))


def make_cases(root: Path) -> list[Case]:
    """All stores, each small enough to be read thousands of times."""
    cases = []
    for number, (name, (facts, codec)) in enumerate(STORES.items()):
        place = root / str(number)
        make_data(Folder(str(place / "data")), facts)
        words = {f"word{i}": i for i in range(facts.targets)}
        (place / "data" / "tokenizer").mkdir()
        Tokenizer(WordLevel(words, unk_token="word0")).save(str(place / "data" / "tokenizer" / "tokenizer.json"))
        make_store(
            Folder(str(place / "store")), facts, Folder(str(place / "data")), codec, without=_HOLES.get(name, [])
        )
        store = place / "store"
        files = {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file()}
        cases.append(Case(name, store, files))
        cases[-1].numbers = read(cases[-1])[0]
    return cases


def read(case: Case, trusting: bool = False) -> tuple[list[Any], TeacherSignal]:
    """Every number that training could ask a store for."""
    store = LogitStore.open(case.folder, verify=not trusting)
    # A store that claims more rows than fit is asked for the first and the last.
    rows = np.arange(store.rows) if store.rows <= 64 else np.array([0, store.rows - 1])
    columns = store.take(rows)
    signal = store.signal(columns, "cpu")
    with suppress(StoreError):
        assert ((found := store.rows_of(columns["sample_id"])) < store.rows).all() and (found >= 0).all()
    values = [columns[name] for name in sorted(columns)]
    values += [v.numpy() if isinstance(v, torch.Tensor) else v for v in vars(signal).values()]
    softened = [part.numpy() for part in signal.at(2.0) if part is not None]
    return [*values, *softened, vars(store.facts), store.plan.codec], signal


def same(found: list[Any], expected: list[Any]) -> bool:
    """Equal to the last bit."""
    return len(found) == len(expected) and all(
        a.dtype == b.dtype and a.shape == b.shape and (a == b).all() if isinstance(a, np.ndarray) else a == b
        for a, b in zip(found, expected, strict=True)
    )


def check_invariants(signal: TeacherSignal) -> None:
    """What a loss relies on: ids that are classes, no number that isn't one, and all mass accounted for at any T."""
    for ids in (signal.head_ids, signal.draw_ids, signal.top1):
        assert ids is None or not ids.numel() or 0 <= int(ids.min()) <= int(ids.max()) < signal.classes
    for values in (signal.head_logprob, signal.gold_logprob, signal.entropy):
        assert bool(torch.isfinite(values).all())
    assert bool((signal.gold_rank >= -1).all())
    for temperature in (0.5, 1.0, 3.0, 10.0):
        head, rest = signal.at(temperature)
        empty = torch.full((len(signal),), -torch.inf)
        both = torch.cat([head, (empty if rest is None else rest)[:, None]], dim=1)
        assert not bool(torch.isnan(both).any()), f"T = {temperature}"
        total = both.exp().sum(dim=-1)
        # A position whose head and tail both claim to be empty has nothing to add up.
        held = torch.isfinite(both).any(dim=-1)
        assert bool(((total - 1).abs()[held] < 1e-3).all()), f"mass {total.tolist()} at T = {temperature}"
        if signal.draw_ids is not None:
            assert not bool(torch.isnan(signal.draws_at(temperature)).any())


def mutate(cases: list[Case], case: Case, rng: random.Random) -> tuple[str, bytes, str]:
    """A file of the case, other contents for it, and what was done."""
    # Half of them in the parts: that is where most can go wrong.
    parts = sorted(n for n in case.files if n.endswith(".arrow"))
    name = rng.choice(parts if rng.random() < 0.5 else sorted(case.files))
    content = bytearray(case.files[name])
    at, length = rng.randrange(len(content)), rng.choice([1, 2, 4, 8, 16, 64])
    kind = rng.choice(
        ["flip", "flip", "bytes", "word", "word", "cut", "insert", "delete", "repeat", "swap", "json", "json"]
    )
    if kind == "json" and name.endswith(".json"):
        return name, mutate_json(bytes(content), rng), f"{kind} in {name}"
    if kind == "swap":
        other = rng.choice(cases)
        source = rng.choice(sorted(other.files))
        return name, other.files[source], f"{source} of {other.name} as {name}"
    if kind == "bytes":
        content[at : at + length] = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * len(content[at : at + length])
    elif kind in ("word", "json"):
        width = rng.choice([2, 4, 8])
        at -= at % width
        content[at : at + width] = (rng.choice(_WORDS) % (1 << 8 * width)).to_bytes(width, "little")
    elif kind == "cut":
        del content[at:]
    elif kind == "insert":
        content[at:at] = rng.randbytes(length)
    elif kind == "delete":
        del content[at : at + length]
    elif kind == "repeat":
        content[at:at] = content[max(0, at - length) : at]
    else:
        for _ in range(rng.choice([1, 1, 3])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return name, bytes(content), f"{kind} at {at} of {name}"


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """One value of a JSON file replaced, doubled, dropped, or nested beyond reason."""
    if rng.random() < 0.03:
        return b"[" * 50_000 + b"]" * 50_000
    tree = json.loads(content)
    node: Any = {"": tree}
    key: Any = ""
    while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.9:
        node = node[key]
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    what = rng.choice(["number", "number", "other", "drop", "double", "near"])
    if what == "drop" and key != "":
        del node[key]
    elif what == "double" and isinstance(node, list):
        node.insert(key, node[key])
    elif what == "near" and isinstance(node[key], int):
        node[key] += rng.choice([-1, 1])
    else:
        node[key] = rng.choice(_NUMBERS if what == "number" else _OTHERS)
    text = json.dumps(node[""] if key == "" else tree)
    return text.replace("1e+308", "1e999").encode() if rng.random() < 0.1 else text.encode()


def write(case: Case, name: str, content: bytes) -> None:
    """Under a new inode, since what is mapped of the old one must stay as it is."""
    path = case.root / name
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def reseal(case: Case, name: str, content: bytes) -> list[str]:
    """Make every checksum right again after ``name`` was changed; returns the files that were rewritten for that."""
    rewritten = []

    def update(other: str, change: Any) -> None:
        try:
            values = json.loads((case.root / other).read_text(encoding="utf-8"))
            change(values)
            write(case, other, json.dumps(values).encode())
            rewritten.append(other)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # The mutation left nothing to seal.
            pass

    sha = hashlib.sha256(content).hexdigest()
    if name.endswith(".arrow"):
        part = int(name.split("-")[1].split(".")[0])
        update(f"parts/part-{part:05d}.json", lambda v: v.update(sha256=sha, bytes=len(content)))
        update("parts/manifest.json", lambda v: v["part_sha256"].__setitem__(part, sha))
    table = (case.root / "parts" / "manifest.json").read_bytes()
    plan = (case.root / "plan.json").read_bytes()

    def all_digests(values: Any) -> None:
        totals = json.loads(table.decode())
        values.update(table_sha256=hashlib.sha256(table).hexdigest())
        if name.startswith("parts/manifest"):
            values.update({key: totals[key] for key in ("parts", "rows", "tokens", "bytes") if key in totals})
        values.update(plan=digest(json.loads(plan.decode())))
        values[SEAL] = seal(values)

    update("manifest.json", all_digests)
    return rewritten


@contextmanager
def limits() -> Iterator[list[str]]:
    """At most ``ROOM`` more address space than now, and a list of what code was run meanwhile."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    seen: list[str] = []
    active = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if active and event in _CODE:
            seen.append(f"{event} {args!r:.200}")

    # A hook stays for the life of the process; it is silent once the block has ended.
    sys.addaudithook(hook)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + ROOM, hard))
    try:
        yield seen
    finally:
        active = False
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(cases: list[Case], numbers: range) -> dict[str, int]:
    """Mutations by their numbers, each from the whole store again; returns how they ended, counted.

    Raises:
        AssertionError: naming the mutation whose outcome was neither a refusal nor right numbers.
    """
    ended: dict[str, int] = {}
    for number in numbers:
        rng = random.Random(number)
        case = rng.choice(cases)
        name, content, what = mutate(cases, case, rng)
        write(case, name, content)
        how = rng.choice(["as it is", "resealed", "resealed", "trusted"])
        touched = [name, *(reseal(case, name, content) if how == "resealed" else [])]
        try:
            outcome = _outcome(case, how)
            if number % 64 == 0:
                _look(case)
        except BaseException as error:
            raise AssertionError(
                f"mutation {number} of {case.name} ({what}, {how}): {type(error).__name__}: {error}"
            ) from error
        finally:
            for other in touched:
                write(case, other, case.files[other])
        ended[f"{how}: {outcome}"] = ended.get(f"{how}: {outcome}", 0) + 1
    return ended


def _outcome(case: Case, how: str) -> str:
    try:
        found, signal = read(case, trusting=how == "trusted")
    except StoreError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, "not one sentence"
        return "refused"
    if how == "trusted":
        return "read"
    if same(found, case.numbers):
        return "the same"
    assert how == "resealed", "other numbers, and nobody noticed"
    check_invariants(signal)
    return "other numbers, sound"


def _look(case: Case) -> None:
    assert all(isinstance(sentence, str) for sentence in verify(case.folder))
    with suppress(StoreError):
        render(describe(case.folder))
