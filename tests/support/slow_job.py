"""The recipe of a job that is slow where PAUSE says so, and what may be said of any job; for tests on real engines."""

from __future__ import annotations

from pathlib import Path

OVER = ("finished", "cancelled", "exhausted", "failed")
# submitted, or anything known of a job; nothing else is ever said
STATES = ("submitted", "queued", "running", "requeued", *OVER)
STEPS = 60
RECIPE = f"""
name: slow
model: {{task: "slow_training:Slow"}}
data: {{source: "slow_training:data", batch_size: 16}}
budget: {{steps: {STEPS}}}
strategy: {{name: zero2}}
evaluation: {{at_end: false}}
"""


def write_recipe(folder: Path, more: str = "") -> None:
    """`recipe.yaml` and the code that it names; more: further lines of the recipe."""
    (folder / "recipe.yaml").write_text(RECIPE + more)
    code = Path(__file__).with_name("slow_training.py")
    (folder / code.name).write_text(code.read_text())
