"""What a run does with its final weights, such as an export: part of the run, of its bill and of its budget."""

from __future__ import annotations

from collections.abc import Callable

from ...callbacks.accounting.account import Account, Upcoming


class Afterwards:
    """Called on rank 0 once the final weights are kept. What goes wrong in it does not undo the run.

    Args:
        do: What there is to do.
        seconds: An estimate of how long it takes, by the seconds of a step.
    """

    def __init__(self, do: Callable[[], None], seconds: Callable[[float], float]) -> None:
        self._do, self._seconds = do, seconds
        self.error: Exception | None = None

    def act(self, account: Account, first: bool) -> None:
        """Do it, in the first rank, and keep the error if there is one. Collective."""
        account.spending.windows.enter("report")
        if first:
            try:
                self._do()
            except Exception as error:
                self.error = error
        account.sum_up()

    def add_to(self, upcoming: Upcoming, account: Account) -> Upcoming:
        """Return the costs to come, with this one."""
        seconds = self._seconds(account.horizon.guard.step_seconds())
        account.closing_seconds += seconds
        upcoming.after_seconds += seconds
        return upcoming
