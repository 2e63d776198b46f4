"""What the ranks of a run tell one another after every step, in one vector of named numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Tally:
    """One rank's message; summed over ranks it is everybody's.

    The first seven are totals of this attempt, the others are about this moment.

    Args:
        samples, tokens, padding: of the micro-batches of this rank.
        trained_tokens: those of the tokens that carry loss, where the task says so.
        flops_counted, flops_realised: of its steps; see `flops`.
        joules: of its devices.
        stop: 1 where this rank has been asked to stop.
        save: 1 from rank 0 where a checkpoint is due by a measured amount, such as time.
        horizon: from rank 0, a new last step of the run; 0 leaves it.
        exhausted: 1 from rank 0 where the budget is, in the middle of an evaluation.
        written: 1 where this rank has written its part of the checkpoint under way.
        nonfinite: 1 where this rank's loss, or the gradients, of the step were not finite.
    """

    samples: float = 0.0
    tokens: float = 0.0
    padding: float = 0.0
    trained_tokens: float = 0.0
    flops_counted: float = 0.0
    flops_realised: float = 0.0
    joules: float = 0.0
    stop: float = 0.0
    save: float = 0.0
    horizon: float = 0.0
    exhausted: float = 0.0
    nonfinite: float = 0.0
    written: float = 0.0

    def as_list(self) -> list[float]:
        return [getattr(self, name) for name in FIELDS]

    def clear_requests(self) -> None:
        """Leave the totals; nothing is asked for any more."""
        self.stop = self.save = self.horizon = self.exhausted = self.nonfinite = self.written = 0.0


FIELDS = tuple(field.name for field in fields(Tally))
