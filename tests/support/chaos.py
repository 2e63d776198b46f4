"""Trainings that are struck again and again, and must end as if nothing had happened.

    make chaos CHAOS="[--schedules 300] [--minutes 5] [--seed 0] [--only 17] [--jobs 2]"

A schedule is a strategy, techniques, and one to three faults, all drawn from (seed, number): the same faults strike the
same places whenever it is run, `--only` runs one of them again. Between attempts files may be damaged. The same
training is given again until it ends with 0; then

    its weights are those of a run that was never struck, to the bit, and all of its samples are counted once;
    no attempt said 0 before the end, none hung, none of its processes is left;
    after a signal the next attempt went on from the very step that the last one said was saved.

Prints fault -> tried, good, of those that struck (a training may end before one would); ends with 1 where one was not
good. It ends at its limit of minutes however many are done.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import monotonic

from faults import DAMAGES, FILLER, STRUCK, TRAINS, Fault, Places, draw_fault
from processes import RanksFailed, last_words, run
from toy import ACCUMULATE, GLOBAL_BATCH, STEPS, Toy, fingerprint, held_out, loader, toy

WORLDS = {"single": 1, "ddp": 2, "zero2": 2, "zero3": 2}
TECHNIQUES = ((), ("weight_averaging", "gradual_pruning"))
LONGEST = 90.0  # seconds of an attempt; longer is a hang
DISK = "3m"  # of a run: its checkpoints and a little more


@dataclass(frozen=True)
class Schedule:
    number: int
    strategy: str
    techniques: tuple[str, ...]
    faults: tuple[Fault, ...]
    damages: tuple[str | None, ...]  # after each attempt


def schedule(seed: int, number: int) -> Schedule:
    draw = random.Random(f"{seed} {number}")
    strategy = list(WORLDS)[number % len(WORLDS)]
    faults = tuple(draw_fault(draw, WORLDS[strategy]) for _ in range(draw.randint(1, 3)))
    damages = tuple(draw.choice([None, None, *DAMAGES]) for _ in faults)
    return Schedule(number, strategy, draw.choice(TECHNIQUES), faults, damages)


# -- in a rank --------------------------------------------------------------------------------------------------------
def train(
    folder: Path, strategy: str, techniques: tuple[str, ...], fault: Fault | None, make: Callable[[], Toy] = toy
) -> None:  # fmt: skip
    import logging
    import warnings

    from shoestring.callbacks.catalog.registry import technique_class
    from shoestring.trainer import Trainer

    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    places = Places(fault, folder)
    places.watch(int(os.environ["RANK"]))
    module = make()
    optimizers = module.configure_optimizers
    module.configure_optimizers = lambda: (places.at("configure_optimizers"), optimizers())[1]
    trainer = Trainer(
        techniques=[technique_class(name).example() for name in techniques], strategy=strategy,
        devices=WORLDS[strategy], run_dir=folder / "run", accelerator="cpu", checkpoint_every="3 steps",
        max_steps=STEPS, max_epochs=-1, accumulate_grad_batches=ACCUMULATE, val_check_interval=8, callbacks=[places],
    )  # fmt: skip
    trainer.fit(module, loader(WORLDS[strategy]), held_out())
    places.at("after fit")


# -- the driver -------------------------------------------------------------------------------------------------------
class NotGood(AssertionError):
    pass


class References:
    """The weights of runs that nothing has happened to."""

    def __init__(self, folder: Path, train: Callable[..., None]) -> None:
        self.train, self._folder, self._known, self._lock = train, folder, {}, Lock()

    def __getitem__(self, key: tuple[str, tuple[str, ...]]) -> str:
        with self._lock:
            if key not in self._known:
                folder = self._folder / f"whole-{len(self._known)}"
                codes = run(self.train, folder, *key, None, world=WORLDS[key[0]], folder=folder, timeout=LONGEST)
                if any(codes):
                    raise NotGood(f"undisturbed {key} ends with {codes}\n{last_words(folder)}")
                self._known[key] = weights(folder)
            return self._known[key]


def weights(folder: Path) -> str:
    from shoestring.trainer.checkpoint.weights import load_weights

    return fingerprint(load_weights(folder / "run" / "final"))


def endure(given: Schedule, folder: Path, references: References, struck: list[str]) -> int:
    """Run a schedule; the number of attempts.

    What struck is added to `struck`, and where. Raises NotGood with what is not as it has to be.
    """
    disk, world = folder / "disk", WORLDS[given.strategy]
    whole = references[given.strategy, given.techniques]
    disk.mkdir(parents=True)
    full = any(fault.what == "full disk" for fault in given.faults)
    if full:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "chaos", str(disk)], check=True)
    try:
        for attempt in range(len(given.faults) + 2):
            fault = given.faults[attempt] if attempt < len(given.faults) else None
            logs = folder / f"attempt-{attempt}"
            (disk / TRAINS).unlink(missing_ok=True)
            codes = run(
                references.train, disk, given.strategy, given.techniques, fault, world=world, folder=logs,
                timeout=LONGEST,
            )  # fmt: skip
            hit = (disk / STRUCK).exists()
            if hit:
                struck += [f"{fault.what}, {fault.also}" if fault.also else fault.what, f"at {fault.place}"]
            for name in (FILLER, STRUCK):
                (disk / name).unlink(missing_ok=True)
            # a disk that is full once the weights are written keeps no summary: the next attempt writes it
            knows = not (hit and fault.what == "full disk") or (disk / "run" / "summary.json").exists()
            if not any(codes) and knows:
                _finished(disk, whole, given)
                return attempt + 1
            if fault is None or (any(codes) and not hit):
                raise NotGood(f"an attempt that nothing happened to ends with {codes}\n{last_words(logs)}")
            if any(codes):
                _as_told(fault, codes, disk, logs)
            damage = given.damages[attempt]
            if damage and DAMAGES[damage](disk / "run", random.Random(f"{given.number} {attempt}")):
                struck.append(damage)
        raise NotGood("it does not come to its end")
    finally:
        if full:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def _as_told(fault: Fault, codes: list[int], disk: Path, logs: Path) -> None:
    stopped = fault.what in ("SIGTERM", "SIGUSR1", "SIGINT") and (disk / TRAINS).exists() and fault.place != "after fit"
    if stopped and not set(codes) <= {
        0,
        85,
    }:  # before its first step, and after its fit, it may end as any process does
        raise NotGood(f"asked to stop it ends with {codes}\n{last_words(logs)}")
    if fault.what == "pause":
        raise NotGood(f"paused for a second it ends with {codes}\n{last_words(logs)}")
    if said := re.search(r"stopped on request: step (\d+) is saved", last_words(logs)):
        step = int(said[1])
        if not (disk / "run" / "checkpoints" / f"{step:09d}" / "manifest.json").exists():
            raise NotGood(f"step {step} is not saved\n{last_words(logs)}")


def _finished(disk: Path, whole: str, given: Schedule) -> None:
    final = disk / "run" / "final"
    if not final.exists():
        raise NotGood("it ended with 0 before its end")
    if weights(disk) != whole:
        raise NotGood("its weights are others than those of the undisturbed run")
    summary = json.loads((disk / "run" / "summary.json").read_text())
    if (summary["steps"], summary["samples"]) != (STEPS, STEPS * GLOBAL_BATCH):
        raise NotGood(f"{summary['steps']} steps and {summary['samples']} samples are counted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    end = monotonic() + 60 * given.minutes
    tried: dict[str, int] = defaultdict(int)
    good: dict[str, int] = defaultdict(int)
    bad: list[str] = []
    attempts: list[int] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        os.environ["SHOESTRING_HOME"] = f"{name}/home"
        references = References(Path(name), train)

        def one(number: int) -> None:
            if monotonic() > end:
                return
            drawn, struck = schedule(given.seed, number), []
            folder = Path(name) / str(number)
            try:
                attempts.append(endure(drawn, folder, references, struck))
                problem = None
            except (NotGood, RanksFailed) as error:
                problem = f"{error}"
            except Exception:
                problem = traceback.format_exc()
            for key in {*struck, drawn.strategy}:
                tried[key] += 1
                good[key] += problem is None
            if problem is not None:
                again = f"make chaos CHAOS='--seed {given.seed} --only {number}'"
                line = f"{drawn}\n  again: {again}\n  {problem}"
                bad.append(line)
                print(line, flush=True)

        numbers = range(given.schedules) if given.only is None else [given.only]
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(one, numbers))
    width = max(map(len, tried))
    print(f"{'':{width}}  tried  good")
    for key in sorted(tried):
        print(f"{key:{width}}  {tried[key]:5}  {good[key]:4}")
    done = sum(tried[strategy] for strategy in WORLDS)
    print(f"{done} schedules, {sum(attempts)} attempts, {len(bad)} not good")
    sys.exit(1 if bad or not done else 0)


if __name__ == "__main__":
    main()
