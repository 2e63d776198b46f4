"""Send a run to W&B from its journal, after the fact."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from .identity import RunIdentity, read_summary
from .lines import Row, read
from .runs import effective
from .wandb_sink import WandbSink

_MISSED = "wandb-missed"  # in the run's folder: the first attempt of which W&B lacks rows


def note_missed(run_dir: Path, attempt: int, *, missed: bool) -> None:
    """Remember that W&B did not take all of `attempt`, or forget what it lacked: then it has all."""
    path = run_dir / _MISSED
    with suppress(OSError):  # a full disk: `replay` sends all rows whatever is noted
        if not missed:
            path.unlink(missing_ok=True)
        elif not path.exists():
            path.write_text(f"{attempt}\n")


def missed_rows(run_dir: Path) -> list[Row]:
    """The step rows of earlier attempts that W&B lacks, if any."""
    try:
        first = int((run_dir / _MISSED).read_text())
    except (OSError, ValueError):
        return []
    rows = (row for row in read(run_dir / "events", rank=0) if row.kind == "step" and row.attempt >= first)
    return effective(rows)


def replay(
    run_dir: Path, mode: Literal["offline", "online"] = "online", project: str = "shoestring", timeout: float = 600.0
) -> WandbSink:
    """Feed every step row of rank 0 and the summary of a run to W&B, under the run's own id; the finished sink.

    Steps that were done twice are sent once, as they were done last. Look at `delivered`, `dropped` and `mode` of what
    comes back: `mode` is "offline" if the server could not be reached. Takes at most `timeout` seconds. Online, a run
    that W&B knows already gets the rows again, at the same steps. Raises `IdentityError` if `run_dir` is not a run.
    """
    run_dir = Path(run_dir)
    identity = RunIdentity.load(run_dir)
    rows = effective(row for row in read(run_dir / "events", rank=0) if row.kind == "step")
    sink = WandbSink(mode, project, identity, identity.recipe, run_dir)
    deadline = time.monotonic() + timeout
    for row in rows:
        while sink.pending() > 1000 and not sink.broken and time.monotonic() < deadline:
            time.sleep(0.01)
        sink.put(int(str(row.fields.get("step", row.seq))), row.fields)
    if summary := read_summary(run_dir):
        sink.summarize(summary)
    sink.finish(max(1.0, deadline - time.monotonic()))
    return sink
