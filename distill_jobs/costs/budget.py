"""What the work that runs now has used so far, and whether it may go on: ``costs.budget_usd``."""

import math
import time
from collections.abc import Callable

from cluster.meter import Usage
from distill_jobs.errors import BudgetError
from distill_jobs.words import money

RESERVE_SECONDS = 10.0
"""What may pass between the decision to stop and the last machine's release: checkpoints are written in it."""

_KEEP_SECONDS = 30.0


class Spending:
    """Hears what maps and gangs have held, and stops the work before the budget is exceeded.

    Args:
        priced: US dollars of a usage.
        budget: US dollars; None for as much as it takes.
        keep: called now and then with what has been used, so that it is known whatever becomes of this process.
        clock: seconds.

    Attributes:
        usd: US dollars spent by now, as of when it was last heard of: before the stage, and on it.
    """

    def __init__(
        self,
        priced: Callable[[Usage], float],
        budget: float | None,
        keep: Callable[[Usage], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._priced, self.budget, self._keep, self._clock = priced, budget, keep, clock
        self.begin("", 0.0)

    def begin(self, stage: str, settled: float, beside: Usage | None = None) -> None:
        """A stage begins, with ``settled`` US dollars spent before it.

        Args:
            beside: what is held each second beside what will be heard of, such as a live teacher's actors.

        Raises:
            BudgetError: nothing is left.
        """
        self._stage, self._settled, self._running = stage, settled, dict[str, Usage]()
        self._entered = set[str]()
        self._beside = beside or Usage()
        self._kept = self._clock()
        self._check(0.0)

    @property
    def usage(self) -> Usage:
        """What the stage has used so far, and nobody else enters in the ledger."""
        return sum((used for name, used in self._running.items() if name not in self._entered), Usage())

    def hear(self, name: str, usage: Usage, *, entered: bool = False) -> None:
        """A map or gang has used so much by now.

        Args:
            entered: whether whoever tells it enters it in the ledger.

        Raises:
            BudgetError: with what goes on until it has stopped, the budget would be exceeded.
        """
        self._running[name] = usage
        self._entered |= {name} if entered else set()
        if self._clock() - self._kept >= _KEEP_SECONDS:
            self._kept = self._clock()
            self._keep(self.usage)
        # What it holds from now on costs as much a second as it did so far.
        pace = self._usd(usage) / usage.wall_seconds if usage.wall_seconds else 0.0
        self._check(pace * RESERVE_SECONDS)

    def _usd(self, usage: Usage) -> float:
        seconds, beside = usage.wall_seconds, self._beside
        return self._priced(usage) + self._priced(
            Usage(device_seconds=seconds * beside.device_seconds, core_seconds=seconds * beside.core_seconds)
        )

    def _check(self, reserve: float) -> None:
        here = math.fsum(map(self._usd, self._running.values()))
        spent = self.usd = self._settled + here
        if self.budget is None or spent + reserve < self.budget:
            return
        of_it = f", {money(here)} of it on {self._stage}" if here else ""
        raise BudgetError(
            f"stopped before costs.budget_usd is exceeded: of {money(self.budget)}, {money(spent)} is spent{of_it}, "
            f"and {money(max(0.0, self.budget - spent))} is left. What was committed is kept: raise costs.budget_usd, "
            f"and the same command goes on from there"
        )


def refuse_or_warn(budget: float | None, spent: float, predicted: float, within: float) -> str | None:
    """What to tell before anything is spent; None where the budget will do.

    Args:
        spent, predicted: US dollars spent already, and predicted for what is left.
        within: the factor that the prediction is right within.

    Raises:
        BudgetError: even a prediction that is too high by that factor would exceed the budget.
    """
    if budget is None or spent + predicted <= budget:
        return None
    told = f"{money(spent)} is spent and about {money(predicted)} more is predicted"
    if spent + predicted / within > budget:
        raise BudgetError(
            f"costs.budget_usd is {money(budget)}, but {told} (right within a factor of {within:g}): nothing was "
            f"started; raise the budget, or ask for less: fewer seeds, epochs or rows, a smaller model"
        )
    return f"costs.budget_usd is {money(budget)}, but {told}: it may stop before the end, and can then go on with more"
