"""Where a gap between groups comes from, by paired tests that are corrected for their number.

A gap is the measure of a group less that of all other rows of its column. Four hypotheses are tested for each gap, each
by the t of ``intervals``: the *teacher* has no such gap; the *baseline* has none; the *student* has none; student and
baseline have the same (*change*, paired over rows and seeds). All of them together are one family under Holm (1979), so
that in a job where nothing is wrong the chance of any label but *no gap shown* is at most 5%, whatever depends on what.
A gap or a change is *shown* where its hypothesis is refused. The label is the first that fits:

- *amplified*: the student's gap is shown, the change is shown and widens it, and the baseline's is shown the same way:
  there without a teacher, and larger with one.
- *inherited*: the same, but the baseline's is not shown that way, and the teacher's is.
- *introduced by distillation*: the same, and the teacher's is not shown that way either.
- *repaired*: the baseline's is shown, and the change is shown and goes against it.
- *present without a teacher*: the baseline's is shown, and no change.
- *origin not shown*: the student's is shown, but neither the baseline's nor a change: too few rows or seeds to say.
- *the teacher's alone*: only the teacher's is shown.
- *no gap shown*: none is.
"""

import numpy as np

INHERITED = "inherited"
AMPLIFIED = "amplified"
REPAIRED = "repaired"
INTRODUCED = "introduced by distillation"
PRESENT = "present without a teacher"
UNSHOWN = "origin not shown"
TEACHERS = "the teacher's alone"
NONE = "no gap shown"
LABELS = (INHERITED, AMPLIFIED, REPAIRED, INTRODUCED, PRESENT, UNSHOWN, TEACHERS, NONE)
TESTS = ("teacher", "baseline", "student", "change")
FALSE_ALARMS = 0.05


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjusted p-values of one family [m], in the order given: refuse where one is at most ``FALSE_ALARMS``."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, dtype=np.float64)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted


def label_of(sizes: dict[str, float], shown: dict[str, bool]) -> str:
    """The label of a gap from its size, and from what of it is shown, both by the names of ``TESTS``."""
    baseline, student, change = (sizes[name] for name in ("baseline", "student", "change"))
    if shown["student"] and shown["change"] and student * change > 0:
        if shown["baseline"] and baseline * student > 0:
            return AMPLIFIED
        return INHERITED if shown["teacher"] and sizes["teacher"] * student > 0 else INTRODUCED
    if shown["baseline"]:
        return REPAIRED if shown["change"] and baseline * change < 0 else PRESENT
    if shown["student"]:
        return UNSHOWN
    return TEACHERS if shown["teacher"] else NONE
