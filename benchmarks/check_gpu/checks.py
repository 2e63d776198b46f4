"""What a step has found: figures, and what should hold; on the disk at once, so that one that is ended has told it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Checks:
    """Figures and checks of one step.

    Args:
        device: "cuda" or "cpu".
        file: Where they are written.
    """

    def __init__(self, device: str, file: Path) -> None:
        self.device, self._file = device, file
        self._figures: dict[str, Any] = {}
        self._checks: dict[str, bool | str] = {}

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def figure(self, **named: Any) -> None:
        """Note what was measured; floats to four digits."""
        self._figures |= {name: _short(value) for name, value in named.items()}
        self._write()

    def holds(self, what: str, truth: Any) -> None:
        """Note whether something that should hold does; noted twice, it has to hold both times."""
        self._checks[what] = bool(truth) and self._checks.get(what, True) is True
        self._write()

    def needs(self, what: str, lacking: str = "CUDA") -> None:
        """Note what cannot be shown here, and what it needs. It is never counted as if it held."""
        self._checks[what] = f"needs {lacking}"
        self._write()

    def holds_on_cuda(self, what: str, truth: Callable[[], Any], why: str = "CUDA") -> None:
        """`holds` where there is a GPU, else `needs`."""
        if self.cuda:
            self.holds(what, truth())
        else:
            self.needs(what, why)

    def _write(self) -> None:
        whole = self._file.with_suffix(".part")
        whole.write_text(json.dumps({"figures": self._figures, "checks": self._checks}))
        whole.replace(self._file)


def main(steps: Mapping[str, Callable[[Checks], None]]) -> None:
    """Run the step that the command line names: `SCRIPT STEP --device cuda|cpu --file FILE`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=steps)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--file", type=Path, required=True)
    given = parser.parse_args()
    steps[given.step](Checks(given.device, given.file))


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _short(inner) for key, inner in value.items()}
    return [_short(inner) for inner in value] if isinstance(value, list | tuple) else value
