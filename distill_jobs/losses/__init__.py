"""The loss of a student: hard labels and the teacher's soft ones. A new soft loss is one line in ``LOSSES``."""

from distill_jobs.losses.soft import forward_kl
from distill_jobs.losses.total import LossParts, SoftLoss, distillation_loss

LOSSES: dict[str, SoftLoss] = {"forward_kl": forward_kl}

__all__ = ["LOSSES", "LossParts", "SoftLoss", "distillation_loss", "forward_kl"]
