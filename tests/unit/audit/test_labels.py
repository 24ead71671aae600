"""Holm by hand, and every label reached."""

import numpy as np
import pytest

from distill_jobs.audit import labels
from distill_jobs.audit.labels import holm, label_of


def test_holm_by_hand() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


CASES = [
    # teacher, baseline, student; which are shown
    (0.2, 0.0, 0.2, "TS C", labels.INHERITED),
    (0.2, -0.2, 0.2, "TBSC", labels.INHERITED),
    (0.0, 0.1, 0.3, "BSC", labels.AMPLIFIED),
    (0.3, 0.1, 0.2, "TBSC", labels.AMPLIFIED),
    (-0.3, -0.1, -0.2, "TBSC", labels.AMPLIFIED),
    (0.0, 0.0, 0.2, "SC", labels.INTRODUCED),
    (-0.2, 0.0, 0.2, "TSC", labels.INTRODUCED),
    (0.0, 0.3, 0.1, "BSC", labels.REPAIRED),
    (0.0, 0.3, 0.0, "BC", labels.REPAIRED),
    (0.2, 0.2, 0.21, "TBS", labels.PRESENT),
    (0.0, 0.2, 0.1, "B", labels.PRESENT),
    (0.2, 0.1, 0.2, "TS", labels.UNSHOWN),
    (0.2, 0.0, 0.1, "T", labels.TEACHERS),
    (0.1, 0.1, 0.1, "", labels.NONE),
    (0.0, -0.1, 0.1, "C", labels.NONE),
]


@pytest.mark.parametrize(("teacher", "baseline", "student", "shown", "label"), CASES)
def test_every_label(teacher: float, baseline: float, student: float, shown: str, label: str) -> None:
    sizes = {"teacher": teacher, "baseline": baseline, "student": student, "change": student - baseline}
    flags = {name: name[0].upper() in shown for name in labels.TESTS}
    assert label_of(sizes, flags) == label


def test_all_labels_are_reached_above() -> None:
    assert {case[-1] for case in CASES} == set(labels.LABELS)
