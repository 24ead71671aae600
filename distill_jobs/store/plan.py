"""The plan of a logit store: what it is made from and how, written before the first part and checked by everyone."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

from cluster.errors import FileError
from cluster.files import Folder, digest
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import DataError, StoreError, VocabularyError
from distill_jobs.store import SCHEMA_VERSION
from distill_jobs.store.codecs import Codec, Field, codec_from_plan
from distill_jobs.store.features import FeatureCoding
from distill_jobs.store.rows import data_columns

PLAN = "plan.json"
PARTS = "parts"
COLD = "cold.json"
SPLIT = "train"

MIGRATIONS = {version: f"capture again: version {version} has no migration" for version in (1, 2)}
"""What to do with a store of an older schema version."""


@dataclass(frozen=True)
class StorePlan:
    """The contract between a teacher, its data and whoever trains from the store.

    A part depends on the *contract* (teacher, tokenizer, vocabulary, codec, seed …) and on its own part of the data,
    not on how many parts there are: a store grows with its data, and a part whose data stay as they were is kept.

    Attributes:
        teacher: digest of the teacher's weights.
        tokenizer_sha: digest of the tokenizer's vocabulary; None without a tokenizer.
        data_fingerprint: ``DataFacts.fingerprint`` of the data.
        vocabulary: ``real``, the classes that are told apart, and ``padded``, the width of the teacher's logits.
        codec: its ``name`` and arguments.
        parts: number of parts; part N holds the rows of the data's part N in their order.
        positions_per_row: distributions in a row (the sequence length for a language model, else 1).
        facts: the data's facts, as plain values, so that the store can be trained from alone.
        seed: what the codec's draws start from, together with sample ids and positions.
        precision: the arithmetic that was asked of the teacher; ``auto`` is that of the device.
        features: what ``FeatureCoding.as_plan`` gives, of a store that holds features of layers.
    """

    teacher: str
    tokenizer_sha: str | None
    data_fingerprint: str
    vocabulary: dict[str, int]
    codec: dict[str, Any]
    parts: int
    positions_per_row: int
    facts: dict[str, Any]
    seed: int = 0
    precision: str = "auto"
    schema_version: int = SCHEMA_VERSION
    features: dict[str, Any] | None = None

    @classmethod
    def make(
        cls,
        facts: DataFacts,
        codec: Codec,
        teacher: str,
        outputs: int,
        *,
        seed: int = 0,
        precision: str = "auto",
        features: FeatureCoding | None = None,
    ) -> Self:
        """The plan for the data's training split and a teacher that gives ``outputs`` logits.

        Raises:
            VocabularyError: the teacher gives fewer logits than there are classes.
        """
        if outputs < facts.targets:
            raise VocabularyError(
                f"the teacher gives {outputs} logits, but the data have {facts.targets} classes or tokens; "
                "use the teacher's own tokenizer, or a teacher for these classes"
            )
        return cls(
            teacher=teacher,
            tokenizer_sha=facts.tokenizer_sha,
            data_fingerprint=facts.fingerprint,
            vocabulary={"real": facts.targets, "padded": outputs},
            codec={"name": codec.name, **codec.arguments()},
            parts=facts.splits[SPLIT]["parts"],
            positions_per_row=facts.positions_per_row,
            facts=_plain(facts),
            seed=seed,
            precision=precision,
            features=features.as_plan() if features else None,
        )

    @classmethod
    def load(cls, folder: Folder) -> Self:
        """Read ``plan.json``.

        Raises:
            StoreError: it is missing, damaged, or of another schema version.
        """
        where = f"{folder}/{PLAN}"
        if not folder.exists(PLAN):
            raise StoreError(f"there is no logit store in {folder}: it has no {PLAN}")
        try:
            values = folder.read_json(PLAN)
        except FileError as error:
            raise StoreError(str(error)) from None
        _check_version(values.get("schema_version") if isinstance(values, dict) else None, where)
        try:
            plan = cls(**values)
            plan._check()
        except (TypeError, KeyError, AttributeError, DataError, OverflowError):
            raise StoreError(f"{where} is not a valid plan of a logit store; capture again") from None
        return plan

    def save(self, folder: Folder) -> None:
        folder.write_json(PLAN, self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """What ``plan.json`` holds; a store without features says nothing of them, as before there were any."""
        return {name: value for name, value in asdict(self).items() if name != "features" or value is not None}

    @property
    def classes(self) -> int:
        """Classes that are told apart: the width of a dense target."""
        return self.vocabulary["real"]

    @property
    def digest(self) -> str:
        """Changes when anything in the plan does: a manifest carries that of its own plan."""
        return digest(self.as_dict())

    @cached_property
    def contract(self) -> str:
        """Changes when anything does that all parts depend on; the data of single parts are not among it."""
        return digest({name: value for name, value in self.as_dict().items() if name in _CONTRACT})

    def part_inputs(self, data_sha256: str) -> str:
        """The digest of all that one part is made from: a part with another one is made again.

        Args:
            data_sha256: SHA-256 of the data's part of the same number; empty where it has no rows or there are no data.
        """
        return digest([self.contract, data_sha256])

    def make_codec(self) -> Codec:
        return codec_from_plan(self.codec)

    def make_features(self) -> FeatureCoding | None:
        return FeatureCoding.from_plan(self.features)

    def fields(self) -> dict[str, Field]:
        """All columns of the teacher in a part, by their names without the prefix: the codec's, then the features'."""
        features = self.make_features()
        return {**self.make_codec().fields(self.classes), **(features.fields() if features else {})}

    @property
    def bytes_per_position(self) -> int:
        """Stored bytes of one position, features among them."""
        return sum(field.bytes for field in self.fields().values())

    def make_facts(self) -> DataFacts:
        return DataFacts.of(self.facts, "the store's plan")

    def _check(self) -> None:
        sizes = (self.vocabulary["real"], self.vocabulary["padded"], self.positions_per_row, self.parts, self.seed)
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 40 for n in sizes):
            raise TypeError
        facts = self.make_facts()
        data_columns(facts)
        agree = (
            facts.targets == self.classes
            and facts.positions_per_row == self.positions_per_row
            and facts.fingerprint == self.data_fingerprint
            and facts.tokenizer_sha == self.tokenizer_sha
        )
        words = isinstance(self.teacher, str) and isinstance(self.precision, str)
        if not agree or not words or self.schema_version != SCHEMA_VERSION:
            raise TypeError
        # Arrow's lists are counted in 32 bits, whatever a damaged plan may ask for.
        widest = max(field.width for field in self.fields().values())
        if widest * self.positions_per_row >= 1 << 31:
            raise TypeError


def workdir_of(folder: Folder) -> Folder:
    """The folder that a store lies in: its data and its teacher are there, where they are anywhere."""
    if folder.is_local:
        return Folder(str(folder.path().parent))
    # An object store knows no "..".
    return Folder(folder.uri.rstrip("/").rpartition("/")[0])


def refuse_cold(folder: Folder) -> None:
    """Raise StoreError where a store is in cold form, or half-way there."""
    if folder.exists(COLD):
        raise StoreError(f"the store in {folder} is archived (cold); turn it back by `distill store restore {folder}`")


_CONTRACT = (
    "schema_version",
    "teacher",
    "tokenizer_sha",
    "vocabulary",
    "codec",
    "positions_per_row",
    "seed",
    "precision",
    "features",
)


def check_student(plan: StorePlan, outputs: int, tokenizer_sha: str | None) -> None:
    """Refuse a student that can't learn from this store, before anything is spent.

    Args:
        outputs: width of the student's logits (may be padded beyond the real classes).
        tokenizer_sha: digest of the student's tokenizer; None when it has none of its own.

    Raises:
        VocabularyError: too few logits, or another tokenizer.
    """
    if outputs < plan.classes:
        raise VocabularyError(
            f"the student gives {outputs} logits but the store holds {plan.classes} classes; use a student with at "
            f"least {plan.classes} outputs"
        )
    if plan.tokenizer_sha and tokenizer_sha and tokenizer_sha != plan.tokenizer_sha:
        raise VocabularyError(
            f"the student's tokenizer ({tokenizer_sha[:12]}) is not the one of the store ({plan.tokenizer_sha[:12]}): "
            "token ids would mean different things; use a student with the teacher's tokenizer"
        )


def check_teacher(plan: StorePlan, teacher: str, facts: DataFacts) -> None:
    """Refuse a store that another teacher made, or that was made from other data.

    Raises:
        StoreError: the digest of the teacher or the fingerprint of the data differs.
    """
    if plan.teacher != teacher:
        raise StoreError(
            f"the store was made by another teacher ({plan.teacher[:12]}, not {teacher[:12]}); capture again"
        )
    if plan.data_fingerprint != facts.fingerprint:
        raise StoreError(
            f"the store was made from other data ({plan.data_fingerprint[:12]}, not {facts.fingerprint[:12]}); "
            "capture again"
        )


def _check_version(version: Any, where: str) -> None:
    if not isinstance(version, int) or version == SCHEMA_VERSION:
        return
    remedy = "upgrade distill-jobs" if version > SCHEMA_VERSION else MIGRATIONS.get(version, "capture again")
    raise StoreError(f"{where} has schema version {version}, but this release reads {SCHEMA_VERSION}: {remedy}")


def _plain(facts: DataFacts) -> dict[str, Any]:
    """Facts as JSON gives them back, so that a plan equals itself after a round trip."""
    values = facts.as_dict()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
