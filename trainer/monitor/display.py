"""What shows a run while it goes on: the terminal of the command line, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Display(Protocol):
    """A display of a run while it goes on."""

    def receipt(self, receipt: Mapping[str, Any]) -> None: ...

    def step(self, row: Mapping[str, Any]) -> None: ...

    def samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None: ...

    def close(self) -> None: ...
