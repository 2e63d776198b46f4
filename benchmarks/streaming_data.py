"""What a set larger than memory costs: its first reading, a start after it, and a run that breaks off in it.

    python benchmarks/streaming_data.py [--megabytes 2048] [--steps 200] [--write]

Rows of text in one .jsonl file, tokenized by a trained BPE, packed. Each line is a process of its own; its memory is
the most that the system has counted as its (VmHWM: files that are mapped included), and beside it stands what the same
process takes on a file of 2 MB, which is Python, torch and the model. Samples are compared by digest, step by step.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import arguments, measured, page, publish, table, wrapped

BEGAN = time.time()
SMALL, BATCH, VOCABULARY, WORDS = 2, 8, 4096, 2000
MODEL = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}"


def write_rows(path: Path, megabytes: int) -> None:
    """Rows of 200 to 4,000 characters, of long words of the standard library: a BPE is quick with them."""
    from shoestring.trainer.data.corpora import python_stdlib

    vocabulary = sorted(set(re.findall(r"[a-z_]{9,}", " ".join(python_stdlib(limit=300).texts))))
    draw, written = random.Random(0), 0
    words = " ".join(draw.choice(vocabulary[:: len(vocabulary) // WORDS]) for _ in range(1 << 18))
    with open(path, "w") as file:
        while written < megabytes << 20:
            start = draw.randrange(len(words) - 4000)
            text = words[start : start + draw.randrange(200, 4000)]
            row = json.dumps({"text": f"{written} {text}"}) + "\n"
            written += len(row)
            file.write(row)


def recipe_of(source: Path) -> Any:
    from shoestring.recipes import load_recipe

    return load_recipe(
        "quickstart",
        [
            f"data.source={source}", "data.limit=null", "data.validation=0.001", f"data.batch_size={BATCH}",
            "data.micro_batch_size=auto", "data.sequence_length=256", f"model.config={MODEL}",
            f"model.tokenizer={{train: bpe, vocab_size: {VOCABULARY}}}", "goal=null",
        ],
    )  # fmt: skip


def memory() -> int:
    """MB that the system has counted as this process's, at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024


def train(folder: Path, source: Path, name: str, steps: int, dies_at: int, ranks: int) -> dict[str, float]:
    """Train in the run directory `name`; digests of what each step has seen go to `name`-<rank>.jsonl."""
    import pytorch_lightning as pl

    from shoestring.trainer import Budget, Trainer
    from shoestring.trainer.tasks import build_task
    from shoestring.trainer.tasks.build import TaskData

    began = time.time()
    task = build_task(recipe_of(source), workdir=folder)
    seconds = {"data": time.time() - began - task.model_seconds}

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
            seconds.setdefault("first step", time.time() - BEGAN)
            if trainer.global_step == dies_at:
                os._exit(1)
            rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in batch["input_ids"]]
            with open(folder / f"{name}-{trainer.global_rank}.jsonl", "a") as file:
                file.write(json.dumps([trainer.global_step, rows]) + "\n")

    trainer = Trainer(
        Budget(steps=steps), [], run_dir=folder / name, callbacks=[Seen()], devices=ranks, accelerator="cpu",
        strategy="ddp" if ranks > 1 else "single", checkpoint_every="50 steps", limit_val_batches=0, ledger=False,
        enable_progress_bar=False, log_every=1000, accumulate_grad_batches=2 // ranks,
    )  # fmt: skip
    trainer.fit(task.module, datamodule=TaskData(task, BATCH // 2))
    return seconds


def phase(folder: Path, source: Path, kind: str, name: str, steps: int, dies_at: int, ranks: int) -> None:
    """One line of the page, in a process of its own."""
    began = time.time()
    if kind == "read":
        from shoestring.trainer.data.cache import cache_root
        from shoestring.trainer.data.prepare import prepare

        tokens = prepare(recipe_of(source), cache_root(folder)).facts["train_tokens"]
        facts: dict[str, float] = {"seconds": time.time() - began, "tokens": tokens}
    else:
        facts = train(folder, source, name, steps, dies_at, ranks)
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / "facts.json").write_text(json.dumps({**facts, "memory": memory()}))


def run(
    folder: Path, source: Path, kind: str, name: str = "", steps: int = 1, dies_at: int = -1, ranks: int = 1
) -> Any:
    words = [str(word) for word in (folder, source, kind, name, steps, dies_at, ranks)]
    python = [sys.executable, *(["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else [])]
    env = {name: value for name, value in os.environ.items() if name != "SHOESTRING_HOME"}
    done = subprocess.run([*python, __file__, "--phase", *words], capture_output=True, text=True, env=env)
    if (done.returncode != 0) != (dies_at >= 0):
        raise SystemExit(done.stderr)
    return json.loads((folder / "facts.json").read_text()) if dies_at < 0 else None


def seen(folder: Path, *names: str) -> dict[int, list[str]]:
    """What each step has seen; of several attempts the last one's."""
    steps: dict[int, list[str]] = {}
    for name in names:
        by_step: dict[int, list[str]] = {}
        for file in folder.glob(f"{name}-*.jsonl"):
            for step, rows in map(json.loads, file.read_text().splitlines()):
                by_step.setdefault(step, []).extend(rows)
        steps.update({step: sorted(rows) for step, rows in by_step.items()})
    return steps


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--megabytes", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--phase", nargs=7)
    given = parser.parse_args()
    if given.phase:
        folder, source, kind, name, *numbers = given.phase
        phase(Path(folder), Path(source), kind, name, *map(int, numbers))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = folder / "small.jsonl", folder / "large.jsonl"
        for source, megabytes in zip(sources, (SMALL, given.megabytes), strict=True):
            write_rows(source, megabytes)
        time.sleep(3)  # until it is certain that the files have settled
        small, large = ({kind: run(folder, source, kind) for kind in ("read",)} for source in sources)
        for source, facts, name in zip(sources, (small, large), ("small", "whole"), strict=True):
            facts["again"] = run(folder, source, "read")
            facts["train"] = run(folder, source, "train", name, given.steps)
        rows = [
            [label, f"{large[kind][key]:,.1f}", f"{large[kind]['memory']:,}", f"{small[kind]['memory']:,}"]
            for label, kind, key in (
                ("first reading: checked, split, tokenized, counted", "read", "seconds"),
                ("the same again, all kept", "again", "seconds"),
                (f"train {given.steps} steps: data there after", "train", "data"),
                ("the process's first step after", "train", "first step"),
            )
        ]
        whole, broken = seen(folder, "whole"), random.Random(1).randrange(60, given.steps)
        verdicts = []
        for ranks in (1, 2):
            name = f"broken{ranks}"
            run(folder, sources[1], "train", name, given.steps, dies_at=broken)
            (folder / f"{name}-0.jsonl").rename(folder / f"{name}first-0.jsonl")
            again = run(folder, sources[1], "train", name, given.steps, ranks=ranks)
            same = seen(folder, f"{name}first", name) == whole
            begins = min(seen(folder, name))
            verdicts.append(
                f"killed in step {broken}, resumed from step {begins} on {ranks} {'rank' if ranks == 1 else 'ranks'}: "
                f"{'the same' if same else 'OTHER'} samples in all {len(whole)} steps, first step after "
                f"{again['first step']:.1f} s"
            )
        text = page(
            "A set larger than memory",
            wrapped(
                f"One .jsonl file of {sources[1].stat().st_size / 1e9:.2f} GB, {large['read']['tokens'] / 1e6:,.0f} "
                "million tokens, packed to 256. Memory is the most that a process was counted to have; the last column "
                f"is that of the same process on a file of {SMALL} MB. Seconds are those of whole processes with all "
                "that they import, but in the third line, which is the data alone."
            ),
            table(["", "s", "memory, MB", "of a small file, MB"], rows),
            wrapped("; ".join(verdicts) + "."),
            measured(" ".join(["streaming_data.py", *sys.argv[1:]])),
        )
    publish(text, __file__, given.write)


if __name__ == "__main__":
    main()
