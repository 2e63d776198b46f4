"""What a loss in chunks saves: the peak memory of a step and of an evaluation with a vocabulary of 128k.

    python benchmarks/chunked_loss.py [--rounds 3] [--batches 1 4] [--at-once] [--write]

A llama of width 256 and one layer, 128,000 tokens in its vocabulary, tied, in float32, on a batch of 1 x 1,024 tokens
and of 4 x 1,024. Each figure is a process of its own: the most memory that was resident during two steps (forward and
backward, no optimizer) or two evaluations, above what was resident before them. Medians over the rounds; losses are
compared too, and CPU seconds of the second step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("OMP_NUM_THREADS", "1")
from report import arguments, measured, page, publish, table, wrapped

VOCABULARY, LENGTH = 128_000, 1024


def most_resident() -> int:
    """The most bytes that were resident since this was asked last; the kernel counts."""
    with open("/proc/self/status") as file:
        most = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return most * 1024


def one(rows: int, chunked: bool, trains: bool) -> dict[str, float]:
    """In a process of its own: MiB, CPU seconds and the loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from shoestring.trainer.tasks.next_token import NextTokenLoss

    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=512,
            max_position_embeddings=LENGTH, tie_word_embeddings=True, use_cache=False,
        )
    )  # fmt: skip
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    loss = NextTokenLoss(chunked)
    most_resident()
    before = most_resident()
    for _ in range(2):
        began = time.process_time()
        with torch.set_grad_enabled(trains):
            total, targets = loss(model, {"input_ids": ids, "labels": ids})
        if trains:
            (total / targets).backward()
        seconds = time.process_time() - began
    return {"MiB": (most_resident() - before) / 2**20, "seconds": seconds, "loss": float(total / targets)}


def peaks_of(case: tuple[int, bool, bool]) -> dict[str, float]:
    """`one`, from a process of its own."""
    command = [sys.executable, __file__, "--one", *(str(int(each)) for each in case)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main() -> None:
    parser = arguments("peak memory with and without the loss in chunks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--at-once", action="store_true", help="all cases of a round; memory does not mind")
    parser.add_argument("--one", nargs=3, type=int, metavar=("ROWS", "CHUNKED", "TRAINS"))
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one[0], bool(given.one[1]), bool(given.one[2]))))
        return
    rows, worst = [], 0.0
    cases = [
        (batch, chunked, trains) for trains in (True, False) for batch in given.batches for chunked in (False, True)
    ]
    with ThreadPoolExecutor(len(cases) if given.at_once else 1) as pool:
        rounds = list(pool.map(peaks_of, cases * given.rounds))
    medians = {
        case: {key: statistics.median(each[key] for each in rounds[at :: len(cases)]) for key in rounds[0]}
        for at, case in enumerate(cases)
    }
    for trains in (True, False):
        for batch in given.batches:
            whole, parts = (medians[batch, chunked, trains] for chunked in (False, True))
            worst = max(worst, abs(whole["loss"] - parts["loss"]) / whole["loss"])
            rows.append(
                [
                    f"{'training' if trains else 'validation'}, {batch} x {LENGTH:,}", f"{whole['MiB']:,.0f}",
                    f"{parts['MiB']:,.0f}", f"{parts['MiB'] / whole['MiB']:.2f}", f"{whole['seconds']:.1f}",
                    f"{parts['seconds']:.1f}",
                ]
            )  # fmt: skip
    head = ["", "MiB, whole", "MiB, in chunks", "ratio", "CPU s, whole", "CPU s, in chunks"]
    about = wrapped(
        "A llama of one layer and width 256 with 128,000 tokens in its vocabulary, in float32. MiB are what a step "
        "(forward and backward) or an evaluation takes at its peak above the model and its gradients. In chunks, the "
        "output layer's forward is done twice; in a real model it is a small part of the work. CPU seconds are "
        "those of the second step."
    )
    equal = (
        f"The losses differ by at most {worst:.0e} of themselves." if worst else "The losses are the same to the bit."
    )
    made = wrapped(measured(f"chunked_loss.py {' '.join(sys.argv[1:])}"))
    publish(
        page("What a loss in chunks saves", about, table(head, rows), equal, made), __file__, given.write
    )  # fmt: skip


if __name__ == "__main__":
    main()
