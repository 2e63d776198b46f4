"""The process of its own in which memory is measured: `python -m shoestring.trainer.export.peak QUESTION`, in JSON."""

from __future__ import annotations

import json
import sys

from ..machine.quiet import quiet
from .footprint import forget_peak, resident
from .measure_target import open_target


def main() -> None:
    """Answer one question on stdout; see `footprint.peak_memory`."""
    request = json.loads(sys.argv[1])
    quiet()
    import pytorch_lightning  # noqa: F401  # what every model is opened with is no part of the model
    import transformers  # noqa: F401

    forget_peak()
    idle = resident()
    target = open_target(request["wanted"], data=request["data"], allow_code=request["allow_code"])
    batch = target.batch(request["shape"])
    run = target.logits_function(request["backend"])
    forget_peak()
    run(batch)
    peak = resident("VmHWM")
    print(json.dumps({"peak_bytes": peak, "over_idle_bytes": max(0, peak - idle)}))


if __name__ == "__main__":
    main()
