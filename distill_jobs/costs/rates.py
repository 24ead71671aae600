"""What a short probe of the real models has measured, and what there is to work through: what estimates rest on."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Rates:
    """What a probe measured, on the device and with the threads of one capture actor.

    Attributes:
        capture_row_seconds: teacher forward and encoding of one row.
        encoding_share: the share of that which is not the bare forward.
        student_row_seconds, baseline_row_seconds: forward and backward of one row, with and without soft labels.
        teacher_row_seconds: the same for training the teacher; 0 where it is brought.
        student_forward_row_seconds: the student's bare forward.
        bytes_per_row: of soft targets in the store.
        positions_per_row: positions in a row.
        busy_share: processor time burnt / core-seconds held, of the probe itself.
        teacher_flops, student_flops: floating-point operations of a forward pass over a position; 0 where no formula
            gives them.
    """

    capture_row_seconds: float
    encoding_share: float
    student_row_seconds: float
    baseline_row_seconds: float
    teacher_row_seconds: float
    student_forward_row_seconds: float
    bytes_per_row: float
    positions_per_row: int
    teacher_flops: float = 0.0
    student_flops: float = 0.0
    busy_share: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they come from an actor."""
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """What is there to work through.

    Attributes:
        source_rows: rows of the source files, all splits together.
        prepare_row_seconds: seconds in which one actor prepares one of them.
        train_rows, validation_rows, test_rows: rows of the prepared splits (packed sequences for a language model).
        row_bytes: of a prepared row, in ``data/`` and again in the store.
        teacher_bytes, student_bytes: of the weights on disk.
        bring_seconds: for converting a teacher that is brought; 0 where it is trained or is there already.
    """

    source_rows: int
    prepare_row_seconds: float
    train_rows: int
    validation_rows: int
    test_rows: int
    row_bytes: float = 0.0
    teacher_bytes: int = 0
    student_bytes: int = 0
    bring_seconds: float = 0.0


@dataclass(frozen=True)
class StartUp:
    """Seconds before work begins: of a pool of actors and of a gang of ranks, imports and model loading included."""

    pool: float = 8.0
    gang: float = 15.0
