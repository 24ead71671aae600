"""The loss of a student: hard labels and the teacher's soft ones.

A new soft loss is a function of ``Cells`` in a file here and one line in ``LOSSES``; what the spec may say of it is
declared in ``spec.distill``. A new gate is a function of ``TeacherSignal`` and labels in ``gates`` and one line in
``GATES``, declared in ``spec.gate``. A new feature loss is a function in ``features`` and one line in
``FEATURE_LOSSES``.
"""

from distill_jobs.losses import divergences, features, gates
from distill_jobs.losses.features import FeatureKind
from distill_jobs.losses.gates import Gate, GateKind
from distill_jobs.losses.kinds import FORWARD_KL, Kind, SoftLoss
from distill_jobs.losses.refined import refined
from distill_jobs.losses.schedule import value_at
from distill_jobs.losses.soft import forward_kl
from distill_jobs.losses.total import LossParts, distillation_loss
from distill_jobs.spec import distill as spec
from distill_jobs.spec import gate as gate_spec

LOSSES: dict[str, Kind] = {
    "forward_kl": FORWARD_KL,
    "reverse_kl": Kind(divergences.reverse_kl, spec.ReverseKL),
    "jensen_shannon": Kind(divergences.jensen_shannon, spec.JensenShannon),
    "skew_forward_kl": Kind(divergences.skew_forward_kl, spec.SkewForwardKL),
    "skew_reverse_kl": Kind(divergences.skew_reverse_kl, spec.SkewReverseKL),
    "adaptive_kl": Kind(divergences.adaptive_kl, spec.AdaptiveKL),
    "total_variation": Kind(divergences.total_variation, spec.TotalVariation, power=1),
    "decoupled": Kind(divergences.decoupled, spec.Decoupled),
    "mse": Kind(divergences.mse, spec.Mse),
}

FEATURE_LOSSES: dict[str, FeatureKind] = {
    "mse": FeatureKind(features.mse),
    "cosine": FeatureKind(features.cosine),
    "cka": FeatureKind(features.cka, aligned=False),
}

GATES: dict[str, GateKind] = {
    "none": GateKind(gates.none),
    "drop": GateKind(gates.drop),
    "downweight": GateKind(gates.downweight),
    "swap": GateKind(gates.swap),
    "revise": GateKind(gates.revise),
    "rld": GateKind(gates.rld),
    "selective": GateKind(gates.selective, asks_student=True),
}

_REFINED = Kind(refined, gate_spec.Refined)

__all__ = [
    "FEATURE_LOSSES",
    "GATES",
    "LOSSES",
    "FeatureKind",
    "Gate",
    "GateKind",
    "Kind",
    "LossParts",
    "SoftLoss",
    "distillation_loss",
    "forward_kl",
    "make_loss",
    "value_at",
]


def make_loss(loss: spec.Loss | None = None, standardise: bool = False, gate: gate_spec.Gate | None = None) -> SoftLoss:
    """The soft loss that a spec asks for, behind its gate; without one the forward KL, and no gate."""
    wanted, asked = loss or spec.Loss(forward_kl=spec.ForwardKL()), gate or gate_spec.NO_GATE
    before = Gate(GATES[asked.kind], asked.chosen)
    if asked.rld is not None:
        return SoftLoss(_REFINED, asked.rld, standardise, before)
    return SoftLoss(LOSSES[wanted.kind], wanted.chosen, standardise, before)
