"""Errors that a user reads: one sentence of what was wrong, where, and what to do.

Each takes exactly one message, so each survives pickling between processes. ``exit_code`` is what the command
exits with: 2 for a mistake in the input, 1 for a failure while running.
"""


class DistillError(Exception):
    """Root of the tree."""

    exit_code = 1


class SpecError(DistillError):
    """The job spec is wrong."""

    exit_code = 2


class DataError(DistillError):
    """The user's data are wrong: missing, empty, out of range, not finite."""

    exit_code = 2


class ModelError(DistillError):
    """A model can't be loaded, built or saved as asked."""

    exit_code = 2


class VocabularyError(DistillError):
    """A student's classes or vocabulary don't match the store's."""

    exit_code = 2


class StoreError(DistillError):
    """A logit store is damaged, incomplete or made from something else."""

    exit_code = 2


class NotReadyError(DistillError):
    """A stage was asked for whose earlier stages are not done."""

    exit_code = 2


class SubmitError(DistillError):
    """A job could not run on the cluster that it was to be submitted to."""

    exit_code = 2


class StoppedError(DistillError):
    """Somebody stopped the command."""

    exit_code = 130


class CaptureError(DistillError):
    """The teacher gave something that can't be stored."""


class AuditError(DistillError):
    """What was trained is not fit to be released, by a limit of the spec."""


class BudgetError(DistillError):
    """Going on would cost more than ``costs.budget_usd``."""


class TrainingError(DistillError):
    """Training can't go on, for example because the loss is not finite."""
