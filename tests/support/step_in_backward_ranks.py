"""What one rank does for steps in backward: a run with ordinary steps, one with those, and a resumed one."""

import json
import logging
import os
import warnings
from pathlib import Path

from optimizer_ranks import HALF, STEPS, train


def main(strategy: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    seen = [train(strategy, "adamw", folder / "plain", STEPS, gradient_clip_val=None)]
    options = {"gradient_clip_val": None, "step_in_backward": True}
    seen.append(train(strategy, "adamw", folder / "ours", STEPS, **options))
    train(strategy, "adamw", folder / "resumed", HALF, **options)
    seen.append(train(strategy, "adamw", folder / "resumed", STEPS, **options))
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))
