"""What the rest of a job must know about prepared data: a small page, written last, that the data stand behind."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from cluster.errors import FileError
from cluster.files import Folder
from distill_jobs.data.table import MANIFEST
from distill_jobs.errors import DataError

SPLITS = ("train", "validation", "test")
ROWS_PER_BATCH = 1024


@dataclass(frozen=True)
class DataFacts:
    """The facts of ``data/``, from ``data/manifest.json``; its presence means that all three splits are complete.

    Attributes:
        task: ``causal_lm`` or ``classification``.
        features: ``documents``, ``tabular``, ``text`` or ``image``.
        fingerprint: digest of the source files' content and of everything in the spec that shapes the data.
        sequence_length: tokens in a row (documents: of a packed sequence; text: the longest text); else None.
        feature_width: numbers in a row (tabular: encoded features; image: channels × height × width); else None.
        image_shape: channels, height, width.
        classes: the classes' names as text, in the order of their numbers; empty for a language model.
        vocabulary: the tokenizer's real size (a model's logits may be padded beyond it).
        tokenizer_sha: digest of the tokenizer's vocabulary (each token with its id).
        pad_id: the token id that fills a row; where it stands, ``segments`` or the attention mask say so.
        packing: ``documents`` or ``naive``; None where nothing is packed.
        slices: names of the slice columns, without the ``slice.`` that they carry in the table.
        splits: for each split its ``rows``, ``tokens`` and ``parts``.
        dropped: rows or pieces that were left out or cut, counted by reason.
        reads: the spec's features as given (column, shape, scale …): serving reads raw rows by it as well.
    """

    task: str
    features: str
    fingerprint: str
    sequence_length: int | None = None
    feature_width: int | None = None
    image_shape: tuple[int, int, int] | None = None
    classes: tuple[str, ...] = ()
    vocabulary: int | None = None
    tokenizer_sha: str | None = None
    pad_id: int | None = None
    packing: str | None = None
    slices: tuple[str, ...] = ()
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    reads: dict[str, Any] = field(default_factory=dict)

    @property
    def positions_per_row(self) -> int:
        """Positions of a row for which a model gives a distribution: each token for an LM, else one."""
        return self.sequence_length or 1 if self.task == "causal_lm" else 1

    @property
    def targets(self) -> int:
        """What a distribution goes over: the vocabulary's real size, or the number of classes."""
        return self.vocabulary or 0 if self.task == "causal_lm" else len(self.classes)

    @property
    def rows_per_batch(self) -> int:
        """Rows in an Arrow record batch of a table of such rows (the last of a part may hold fewer)."""
        return 1 if self.task == "causal_lm" else ROWS_PER_BATCH

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return asdict(self)

    @classmethod
    def of(cls, values: Any, origin: str = "the data's manifest") -> Self:
        """From what ``as_dict`` gave, perhaps by way of JSON; raises DataError naming ``origin``."""
        try:
            shape = values.get("image_shape")
            facts = cls(
                **{
                    **values,
                    "image_shape": tuple(shape) if shape else None,
                    "classes": tuple(values["classes"]),
                    "slices": tuple(values["slices"]),
                }
            )
            if not isinstance(facts.fingerprint, str) or facts.targets < 1 or facts.positions_per_row < 1:
                raise TypeError
        except (TypeError, KeyError, AttributeError):
            raise DataError(f"{origin} is not a valid manifest of prepared data; prepare the data again") from None
        return facts

    @classmethod
    def load(cls, folder: Folder) -> Self:
        """Read ``manifest.json`` of a ``data/`` folder; DataError when the data are not prepared or it is damaged."""
        if not folder.exists(MANIFEST):
            raise DataError(f"there are no complete prepared data in {folder}; run the prepare stage first")
        try:
            values = folder.read_json(MANIFEST)
        except FileError as error:
            raise DataError(f"{error}; prepare the data again") from None
        return cls.of(values, f"{folder}/{MANIFEST}")

    def save(self, folder: Folder) -> None:
        """Write ``manifest.json``, which declares the data complete."""
        folder.write_json(MANIFEST, self.as_dict())
