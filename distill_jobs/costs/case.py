"""A question of the advice while it is weighed: goal, evidence, and the reasons that have been noted so far."""

from distill_jobs import words
from distill_jobs.costs.verdict import Answer, Estimate, Evidence, Reason, Verdict
from distill_jobs.spec.goal import Aim, Deploy


class Case:
    """The question, with ways to put numbers into words and to conclude."""

    def __init__(self, kind: str, aim: Aim, evidence: Evidence) -> None:
        self.kind, self.aim, self.evidence = kind, aim, evidence
        self.reasons: list[Reason] = []

    def by(self, estimate: Estimate) -> str:
        """``+0.31 percentage points (95 % interval +0.12 to +0.50)``."""
        metric = self.evidence.metric
        told = f"{words.difference(metric, estimate.value)} {words.unit(metric)}"
        if estimate.low is None or estimate.high is None:
            return f"{told} (no interval)"
        low, high = (words.difference(metric, end) for end in (estimate.low, estimate.high))
        return f"{told} (95{words.NB}% interval {low} to {high})"

    def note(self, text: str, estimate: Estimate) -> None:
        self.reasons.append(Reason.of(text, estimate))

    def conclude(self, answer: Answer, sentence: str, against: list[Reason | None], then: str | None = None) -> Verdict:
        """The verdict; of the arguments against it the first that there is."""
        strongest = next((reason for reason in against if reason is not None), None)
        return Verdict(answer, self.kind, sentence, tuple(self.reasons), strongest, then)

    def note_gain(self) -> Estimate:
        gain = self.evidence.gain
        assert gain is not None
        self.note(
            f"The student's gain over a no-teacher baseline of equal budget is {self.by(gain)}, over "
            f"{self.evidence.seeds} seeds and {self.evidence.rows:,} held-out rows.",
            gain,
        )
        return gain

    def note_money(self) -> None:
        extra, alone = self.evidence.extra_usd, self.evidence.alone_usd
        if extra is not None and alone is not None:
            said = "is predicted to cost" if self.evidence.predicted else "cost"
            told = f"Distilling {said} {words.money(extra)} more than the {words.money(alone)} of training alone."
            source = "plan.json" if self.evidence.predicted else "ledger.json"
            self.reasons.append(Reason(told, extra, None, None, source))

    def note_payback(self) -> None:
        """After how many requests, and months of those that the goal expects, the cheaper student has paid."""
        requests, aim = self.evidence.payback_requests, self.aim
        if requests is None or not isinstance(aim, Deploy):
            return
        told = f"Against serving the teacher, distilling has paid after {words.count(requests)} requests"
        if aim.requests_per_month is not None:
            months = requests / aim.requests_per_month
            told += f", which is {words.significant(months)} months at {words.count(aim.requests_per_month)} a month"
        self.reasons.append(Reason(f"{told}.", requests, None, None, "alternatives.json"))
