"""What one rank does to show that labels are weighed and measured alike: one step, and an evaluation after it."""

import json
import logging
import warnings
from pathlib import Path

from chat_ranks import Gradient
from safetensors.torch import save_file

from shoestring.recipes import recipe_from
from shoestring.trainer import Budget, Trainer
from shoestring.trainer.tasks import build_task
from shoestring.trainer.tasks.build import TaskData

CASES = {
    "weighed": {"task": "sequence-classification", "class_weights": "balanced"},
    "several": {"task": "sequence-classification", "problem": "multi-label"},
    "number": {"task": "sequence-classification", "problem": "regression"},
    "words": {"task": "token-classification"},
    "masked": {"task": "masked-lm"},
    "pairs": {"task": "seq2seq"},
}
SHAPE = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
         "attention_probs_dropout_prob": 0.0}  # fmt: skip
PAIRED = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
          "dropout_rate": 0.0}  # fmt: skip
TRAINED, HELD = 8, 7


def shape(case: str) -> dict[str, object]:
    """The configuration of a case's model."""
    return PAIRED if case == "pairs" else SHAPE


def rows(case: str, count: int) -> str:
    """Rows of different lengths, and rare labels."""
    made = []
    for i in range(count):
        words = [f"w{i}", *["and"] * (i % 4)]
        label = {
            "several": ["a"] if i % 3 else ["a", "b"], "number": i / 2, "words": ["B-X" if i % 2 else "O"] * len(words),
        }.get(case, "rare" if i % 4 == 0 else "usual")  # fmt: skip
        if case == "pairs":
            made.append(json.dumps({"prompt": f"w{i}", "completion": " ".join(words)}))
            continue
        made.append(json.dumps({"text": words if case == "words" else " ".join(words), "label": label}))
    return "\n".join(made)


def evaluated(folder: Path, name: str, *, ranks: int, micro: int) -> None:
    """Leave each case's first gradient and what an evaluation logs, under this name."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for case, model in CASES.items():
        recipe = recipe_from(
            {
                "model": {**model, "config": shape(case), "tokenizer": {"train": "bpe", "vocab_size": 300}},
                "data": {"source": str(folder / f"{case}.jsonl"), "validation": str(folder / f"{case}-held.jsonl"),
                         "batch_size": TRAINED, "sequence_length": 32, "pack": False, "group_by_length": False},
                "budget": {"steps": 1},
            },
            case,
        )  # fmt: skip
        task, seen = build_task(recipe, workdir=folder), Gradient()
        trainer = Trainer(
            Budget(steps=1), [], callbacks=[seen], strategy="ddp" if ranks > 1 else "single", devices=ranks,
            accelerator="cpu", accumulate_grad_batches=TRAINED // ranks // micro, logger=False, ledger=False,
            run_dir=folder / name / case, enable_progress_bar=False, num_sanity_val_steps=0, val_check_interval=1.0,
        )  # fmt: skip
        trainer.fit(task.module, datamodule=TaskData(task, micro))
        if trainer.is_global_zero:
            save_file(seen.gradients, folder / f"{name}-{case}.safetensors")
            results = {"metrics": trainer.summary["metrics"], "details": task.details}
            (folder / f"{name}-{case}.json").write_text(json.dumps(results))
