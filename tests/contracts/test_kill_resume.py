"""Kill -9, SIGTERM, damaged checkpoints, other numbers of ranks: the same command again ends where it would have ended.

The script that is killed is a user's own (tests/support/train_script.py): accumulation 2, two loader workers, shuffled,
dropout, samples that are read with a random part.
"""

import json
import logging
import os
import random
import subprocess
import sys
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import train_script
from processes import last_words, run, succeed
from toy import ACCUMULATE, GLOBAL_BATCH, STEPS, Explode, Exploded, fingerprint, held_out, loader, toy

from shoestring.callbacks.catalog.compose import compose
from shoestring.callbacks.catalog.registry import names, technique_class
from shoestring.callbacks.contract import IncompatibleTechniques
from shoestring.trainer import Budget, Trainer
from shoestring.trainer.checkpoint.format import DamagedCheckpoint
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.ledger import read

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
SCRIPT = Path(train_script.__file__)


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "run" / "final")


def events(folder: Path, kind: str) -> list[dict]:
    """Rank 0's events of one kind, over all attempts."""
    rows = read(folder / "run" / "events", rank=0)
    return [dict(row.fields) for row in rows if row.kind == "event" and row.fields["event"] == kind]


# -- kill -9 -----------------------------------------------------------------------------------------------------------
def together() -> list[tuple[str, ...]]:
    """All techniques, each once, in groups that go together: at most four, so that a failure says enough."""
    groups: list[list[str]] = []
    for name in names():
        for group in [group for group in groups if len(group) < 4]:
            with suppress(IncompatibleTechniques):
                compose([technique_class(one).example() for one in (*group, name)], {"cpu", "bf16", "adamw"})
                group.append(name)
                break
        else:
            groups.append([name])
    return [tuple(group) for group in groups]


ALONE = [("single", 1, group) for group in [(), *((name,) for name in names())]]
TOGETHER = [(strategy, 2, group) for strategy in ("ddp", "zero2") for group in [(), *together()]]
TOGETHER.append(("fsdp2", 2, ()))
# where more than two ranks add numbers, the last bit depends on the order
OF_FOUR = [(strategy, 4, ()) for strategy in ("ddp", "zero2")]


@pytest.mark.parametrize(
    ("strategy", "world", "group"), ALONE + TOGETHER + OF_FOUR, ids=lambda part: str(part).strip("()")
)
def test_killed_and_given_again_ends_bit_for_bit(strategy, world, group, tmp_path):
    draw = random.Random(f"{strategy} {group}")
    mishap = {"step": draw.randrange(2, STEPS), "part": draw.randrange(2), "ranks": [draw.randrange(world)]}
    mishap["signal"] = "SIGKILL"
    print("killed:", mishap)
    command = (train_script.kill_and_compare, tmp_path, strategy, world, group, mishap)
    codes = run(*command, world=world, folder=tmp_path)
    said = last_words(tmp_path)
    assert codes[mishap["ranks"][0]] == -9, said
    assert not (tmp_path / "whole").exists(), said
    succeed(*command, world=world, folder=tmp_path)
    (resume,) = events(tmp_path / "broken", "resume")
    said = f"{mishap}\n{last_words(tmp_path)}"
    newest = max(1, mishap["step"] // train_script.EVERY * train_script.EVERY)
    assert resume["step"] in (newest, max(1, newest - train_script.EVERY)), said  # the newest may not be whole yet
    assert fingerprint(final(tmp_path / "broken")) == fingerprint(final(tmp_path / "whole")), said


# -- a command that Lightning launches, and all that may happen to it --------------------------------------------------
STORY = [
    {"step": 2, "ranks": [1], "signal": "SIGKILL"},
    {"step": 4, "ranks": [1], "signal": "SIGTERM", "part": 1},
    {"step": 6, "ranks": [0, 1], "signal": "SIGTERM"},
    {"step": 8, "ranks": [0], "signal": "SIGTERM", "during": "validation"},
]


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The same command until it ends well: (its folder, what each attempt said and returned)."""
    folder = tmp_path_factory.mktemp("story")
    command = [sys.executable, str(SCRIPT), str(folder), "--strategy", "ddp", "--devices", "2"]
    command += ["--mishaps", json.dumps(STORY), "--techniques", "gradual_pruning", "weight_averaging", "lr_schedule"]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    attempts = []
    while len(attempts) <= len(STORY):
        ended = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100
        )
        attempts.append(ended)
        if ended.returncode == 0:
            break
    return folder, attempts


def transcript(attempts) -> str:
    return "\n".join(f"--- attempt {i}: exit {a.returncode}\n{a.stdout[-2500:]}" for i, a in enumerate(attempts))


def test_every_attempt_ends_with_its_code(story):
    """Killed, asked to stop three times (85: saved, run me again), and finished."""
    _, attempts = story
    codes = [attempt.returncode for attempt in attempts]
    assert codes[0] not in (0, 85), transcript(attempts)
    assert codes[1:] == [85, 85, 85, 0], transcript(attempts)
    for attempt in attempts[1:4]:  # Lightning kills rank 0 when it sees another rank end with anything but 0
        assert "rank 0 ends with 85" in attempt.stdout and "rank 1 ends with 0" in attempt.stdout, transcript(attempts)


@pytest.mark.parametrize(("attempt", "mishap"), [(1, STORY[1]), (2, STORY[2]), (3, STORY[3])])
def test_a_stop_signal_saves_within_two_steps(attempt, mishap, story):
    folder, attempts = story
    stopped = events(folder / "broken", "preempted")[attempt - 1]
    assert mishap["step"] <= stopped["step"] <= mishap["step"] + 2, transcript(attempts)
    resumed = events(folder / "broken", "resume")[attempt]
    assert resumed["step"] == stopped["step"], "nothing is lost"
    if mishap.get("during") == "validation":
        assert stopped["step"] == mishap["step"]


def test_all_of_it_ends_bit_for_bit(story):
    folder, attempts = story
    assert fingerprint(final(folder / "broken")) == fingerprint(final(folder / "whole")), transcript(attempts)


def test_spend_counts_every_attempt(story):
    """Time that a kill has lost stays spent; work is counted once."""
    folder, _ = story
    broken, whole = (json.loads((folder / run / "run" / "summary.json").read_text()) for run in ("broken", "whole"))
    assert broken["steps"] == whole["steps"] == STEPS
    assert broken["samples"] == whole["samples"] == STEPS * GLOBAL_BATCH
    assert broken["seconds"] > whole["seconds"]


# -- other numbers of ranks --------------------------------------------------------------------------------------------
def sampled(path: Path) -> dict[int, list[int]]:
    """step -> the samples it has seen, of all ranks."""
    steps = defaultdict(list)
    for of_rank in path.parent.glob(f"{path.name}.*"):
        for line in of_rank.read_text().splitlines():
            step, indices = json.loads(line)
            steps[step] = sorted(steps[step] + indices)
    return steps


@pytest.mark.parametrize(
    "stretches",
    [
        [("ddp", 2, 4), ("single", 1, 8), ("ddp", 2, None)],
        [("zero2", 2, 5), ("zero2", 1, None)],
        [("zero3", 2, 4), ("fsdp2", 2, 6), ("zero1", 2, 8), ("single", 1, None)],
    ],
    ids=lambda stretches: "-".join(f"{strategy}x{world}" for strategy, world, _ in stretches),
)
def test_other_ranks_see_the_same_global_batches(stretches, tmp_path):
    """Masks and averages move along."""
    for number, (strategy, world, crash) in enumerate(stretches):
        given = (train_script.stretch, tmp_path / "moved", number, strategy, world, crash)
        succeed(*given, world=world, folder=tmp_path / "log")
    strategy, world, _ = stretches[0]
    succeed(train_script.stretch, tmp_path / "whole", 0, strategy, world, None, world=world, folder=tmp_path / "log")
    whole = sampled(tmp_path / "whole" / "samples-0")
    assert whole.keys() == set(range(STEPS)) and all(len(indices) == GLOBAL_BATCH for indices in whole.values())
    moved = [sampled(tmp_path / "moved" / f"samples-{number}") for number in range(len(stretches))]
    assert set().union(*moved) == set(range(STEPS))
    for number, steps in enumerate(moved):
        broken = max(steps) if stretches[number][2] else None  # its last step stopped half-way
        for step, indices in steps.items():
            assert indices == whole[step] or (step == broken and set(indices) < set(whole[step])), (number, step)
    one, other = final(tmp_path / "moved"), final(tmp_path / "whole")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if not tensor.is_floating_point():  # counts micro-batches, and one rank makes more of them
            continue
        assert (tensor - other[name]).abs().max() < 1e-3, name
        assert ((tensor == 0) != (other[name] == 0)).float().mean() < 0.01, name


# -- damaged checkpoints -----------------------------------------------------------------------------------------------
def fit(folder: Path, *callbacks: pl.Callback, budget=None, workers=0, collate=None, **options) -> Trainer:
    """One training in this process."""
    technique = technique_class(options.pop("technique", "weight_averaging")).example()
    trainer = Trainer(
        budget, techniques=[technique], run_dir=folder / "run", ledger=False, accelerator="cpu",
        checkpoint_every="2 steps", accumulate_grad_batches=ACCUMULATE, num_sanity_val_steps=0,
        callbacks=list(callbacks), **(options or {"max_steps": STEPS, "max_epochs": -1}),
    )  # fmt: skip
    trainer.fit(toy(), loader(num_workers=workers, collate_fn=collate), held_out())
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    fit(folder)
    return fingerprint(final(folder))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def missing(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncated, flipped, missing])
@pytest.mark.parametrize("file", ["state.pt", "rank-00000.pt", "tensors-00000.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_reported_and_passed_over(file, damage, whole, tmp_path, caplog):
    with pytest.raises(Exploded):
        fit(tmp_path, Explode(9))
    newest = max((tmp_path / "run" / "checkpoints").glob("0*"))
    assert int(newest.name) == 8
    damage(newest / file)
    with caplog.at_level(logging.WARNING, "shoestring"):
        trainer = fit(tmp_path)
    assert newest.name in caplog.text and "the one before it is used" in caplog.text
    (event,) = events(tmp_path, "checkpoint_damaged")
    assert newest.name in event["reason"]
    assert file in event["reason"] or file == "manifest.json"  # whose hashes then blame another
    assert trainer.summary["resumed_from"] == 6
    assert fingerprint(final(tmp_path)) == whole


def test_no_intact_checkpoint_is_no_silent_restart(tmp_path):
    with pytest.raises(Exploded):
        fit(tmp_path, Explode(9))
    for folder in (tmp_path / "run" / "checkpoints").glob("0*"):
        flipped(folder / "state.pt")
    with pytest.raises(DamagedCheckpoint, match="no intact checkpoint is left"):
        fit(tmp_path)


def test_an_unfinished_checkpoint_is_ignored(whole, tmp_path):
    with pytest.raises(Exploded):
        fit(tmp_path, Explode(9))
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "000000008").rename(checkpoints / ".writing-000000008")
    assert fit(tmp_path).summary["resumed_from"] == 6
    assert fingerprint(final(tmp_path)) == whole
    assert not list(checkpoints.glob(".writing-*"))


# -- what is drawn ahead -----------------------------------------------------------------------------------------------
class Replan(pl.Callback):
    """Moves the end of the run, as a budget of seconds does, but at the same steps in every rerun."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        last = {3: 30, 7: 14}.get(trainer.global_step)
        if last and batch_idx % ACCUMULATE == 0:
            trainer.monitor.account.clock.replan(trainer.global_step, last)


def test_samples_chosen_ahead_are_chosen_again(tmp_path):
    """Two workers have drawn two steps ahead when the plan changes, and before the first one is made."""
    drawn = {"technique": "competence_curriculum", "workers": 2}
    fit(tmp_path / "whole", Replan(), **drawn)
    for crash in (1, 3, 5, 8):
        with pytest.raises(Exploded):
            fit(tmp_path / str(crash), Replan(), Explode(crash), **drawn)
        fit(tmp_path / str(crash), Replan(), **drawn)
        assert fingerprint(final(tmp_path / str(crash))) == fingerprint(final(tmp_path / "whole")), crash


def masking(samples: list[dict]) -> dict:
    """As collators for masked language models do, with the global generator."""
    batch = torch.utils.data.default_collate(samples)
    batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.15] = 0
    return batch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_random_collate_function_repeats_itself(workers, tmp_path):
    drawn = {"workers": workers, "collate": masking}
    fit(tmp_path / "whole", **drawn)
    with pytest.raises(Exploded):
        fit(tmp_path / "broken", Explode(5), **drawn)
    fit(tmp_path / "broken", **drawn)
    assert fingerprint(final(tmp_path / "broken")) == fingerprint(final(tmp_path / "whole"))


# -- the very end ------------------------------------------------------------------------------------------------------
class Fall(pl.Callback):
    """Crashes when training has ended, before the final weights are written."""

    def on_train_end(self, trainer, pl_module):
        raise Exploded("at the end")


ENDS = {
    "max_steps": {"max_steps": STEPS, "max_epochs": -1},
    "budget": {"budget": Budget(steps=STEPS), "max_epochs": -1},
    "max_epochs": {"max_epochs": 2},
}


@pytest.mark.parametrize("end", ENDS.values(), ids=list(ENDS))
def test_crashed_after_the_last_step_writes_the_final_weights(end, tmp_path):
    fit(tmp_path / "whole", **end)
    with pytest.raises(Exploded):
        fit(tmp_path / "broken", Fall(), **end)
    assert not (tmp_path / "broken" / "run" / "final").exists()
    for _ in range(2):  # and a finished run given again stays as it is
        trainer = fit(tmp_path / "broken", **end)
        assert trainer.summary["steps"] == trainer.summary["resumed_from"] == (18 if len(end) == 1 else STEPS)
        assert fingerprint(final(tmp_path / "broken")) == fingerprint(final(tmp_path / "whole"))
