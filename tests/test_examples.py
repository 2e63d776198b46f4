"""The scripts in `examples/` run as a newcomer runs them, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(script: str, *arguments: str, cwd: Path) -> str:
    env = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracy(text: str) -> float:
    share = re.search(r"([0-9.]+)% of the digits", text)
    assert share, text
    return float(share[1])


def test_one_callback_in_a_plain_trainer(tmp_path: Path) -> None:
    output = output_of("plain_lightning.py", cwd=tmp_path)
    assert "90% of the weights are zero" in output
    assert accuracy(output) > 85
    assert not list(tmp_path.iterdir()), "a plain trainer leaves nothing behind"


def test_a_budget_ends_the_run_and_the_same_command_knows_it(tmp_path: Path) -> None:
    output = output_of("budgeted_training.py", "run", cwd=tmp_path)
    assert "250 steps, 8000 samples" in output and "stopped by samples" in output
    assert accuracy(output) > 85
    assert (tmp_path / "run" / "summary.json").is_file()
    again = output_of("budgeted_training.py", "run", cwd=tmp_path)
    assert "250 steps, 8000 samples" in again, "nothing is trained twice"


def test_a_technique_of_ones_own(tmp_path: Path) -> None:
    output = output_of("own_technique.py", cwd=tmp_path)
    assert "GradientNoise(scale=0.01)" in output
    assert accuracy(output) > 85


@pytest.mark.filterwarnings("ignore")
def test_its_strength_0_is_its_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    import own_technique
    import pytorch_lightning as pl
    import torch
    from plain_lightning import Digits

    module = Digits()
    for weight in module.parameters():
        weight.grad = torch.ones_like(weight)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    own_technique.GradientNoise(scale=0.0).on_before_optimizer_step(trainer, module, None)
    assert all(bool((weight.grad == 1).all()) for weight in module.parameters())
