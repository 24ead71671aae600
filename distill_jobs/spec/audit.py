"""The part of a job spec that says what the reckoning looks at. Imports neither torch nor ray."""

from distill_jobs.spec.gate import GateComparison


class Audit(GateComparison):
    """The reckoning on the held-out split."""
