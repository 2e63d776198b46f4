"""What a node holds that fine-tunes 1.1B parameters: LoRA beside a frozen base in nf4 and in bf16, 2 ranks of ZeRO-2.

    python benchmarks/large_base.py [--bases nf4 bf16] [--steps 3] [--write]

A llama of TinyLlama's shape with weights drawn at random, rank 16 on all linear layers, packed rows of 64 tokens. The
memory of the node is what all processes of the run hold together, sampled twice a second: private pages, and shared
ones once (Pss), pages of mapped files among them; anonymous pages are told apart, for the kernel can drop the others.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from report import arguments, measured, page, publish, table, wrapped

RECIPE = """
model:
  task: causal-lm
  config: {{model_type: llama, hidden_size: 2048, intermediate_size: 5632, num_hidden_layers: 22,
           num_attention_heads: 32, num_key_value_heads: 4, vocab_size: 32000}}
  tokenizer: {{train: bpe, vocab_size: 512}}
  adapter: {{kind: lora, rank: 16}}
  dtype: {base}
precision: bf16
data: {{source: python-stdlib, limit: 40, sequence_length: 64, batch_size: 2, micro_batch_size: 1, validation: 0}}
optimizer: {{lr: 1e-4}}
budget: {{steps: {steps}}}
strategy: {{name: zero2, devices: 2, hang_after: 1 h}}
cluster: {{hardware: cpu}}
tracking: {{ledger: false}}
checkpoint: {{every: 1 h}}
"""


def held(parent: psutil.Process) -> tuple[int, int]:
    """Bytes of a process and all that it started: together (Pss), and anonymous ones of them."""
    together = anonymous = 0
    for process in [parent, *parent.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has ended
            continue
        sizes = {name: int(size.split()[0]) << 10 for name, size in (line.split(":") for line in lines)}
        together += sizes["Pss"]
        anonymous += sizes["Pss_Anon"]
    return together, anonymous


def watched(base: str, steps: int) -> dict[str, float]:
    """GiB at the fullest moment until the first step, and after it; CPU seconds; whether the run ended well."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "large.yaml"
        recipe.write_text(RECIPE.format(base=base, steps=steps))
        command = ["torchrun", "--nproc-per-node=2", "-m", "shoestring.trainer.cli", "train", str(recipe)]
        run = subprocess.Popen(
            [str(Path(sys.executable).with_name(command[0])), *command[1:]], cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "SHOESTRING_HOME": f"{folder}/home"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        parent, journal = psutil.Process(run.pid), Path(folder) / "runs" / "large" / "events"
        peaks: dict[str, list[int]] = {"loading": [0, 0], "training": [0, 0]}
        try:
            while run.poll() is None:
                trains = any('"step"' in path.read_text() for path in journal.glob("*.jsonl"))
                kept = peaks["training" if trains else "loading"]
                kept[:] = map(max, kept, held(parent))
                time.sleep(0.5)
        except KeyboardInterrupt:
            run.send_signal(signal.SIGINT)
            raise
        assert run.returncode == 0, (run.stderr.read() if run.stderr else "")[-3000:]
    return {f"{name} {kind}": peak / 2**30 for name, sizes in peaks.items()
            for kind, peak in zip(("together", "anonymous"), sizes, strict=True)}  # fmt: skip


def main() -> None:
    parser = arguments("memory of a node that fine-tunes 1.1B parameters")
    parser.add_argument("--bases", nargs="+", default=["nf4", "bf16"])
    parser.add_argument("--steps", type=int, default=3)
    given = parser.parse_args()
    peaks = {base: watched(base, given.steps) for base in given.bases}
    head = ["base", *next(iter(peaks.values()))]
    rows = [[base, *(f"{value:.2f}" for value in values.values())] for base, values in peaks.items()]
    about = wrapped(" ".join((__doc__ or "").split("\n\n")[2:]) + " GiB.")
    publish(
        page("What a node holds that fine-tunes 1.1B parameters", about, table(head, rows),
             wrapped(measured(f"large_base.py {' '.join(sys.argv[1:])}"))),
        __file__, given.write,
    )  # fmt: skip


if __name__ == "__main__":
    main()
