"""The shipped recipes with everything that costs time made small: models, texts, rows and batches."""

from __future__ import annotations

import json
from contextlib import chdir
from pathlib import Path

from shoestring.recipes import Recipe, load_recipe
from shoestring.trainer.tasks import build_task

SHORT = ["data.sequence_length=32", "data.batch_size=4", "data.micro_batch_size=auto"]
DATA = ["data.source=texts.txt", "data.args={sample_by: line}", "data.limit=null", *SHORT]
CHATS = ["data.source=chats.jsonl", "data.limit=null", *SHORT, "data.sequence_length=128"]
SCRATCH = [
    "model.config={model_type: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, "
    "intermediate_size: 64, max_position_embeddings: 128, tie_word_embeddings: true}",
]
CLASSIFIER = ["model.name=runs/finetune-minilm/model", "data.limit=400", *SHORT]
IMAGES = ["data.limit=100", "data.batch_size=20"]
CHANGES = {
    "quickstart": [*DATA, *SCRATCH, "model.tokenizer.vocab_size=300"],
    "train-large-then-compress": [*DATA, *SCRATCH, "model.tokenizer.vocab_size=300"],
    "distill": [*DATA, *SCRATCH],
    "finetune-lora": DATA,
    "sft-lora": CHATS,
    "sft-qlora": CHATS,
    "dpo": ["data.limit=100", *SHORT, "data.sequence_length=64"],
    "continue-pretraining": DATA,
    "qat-lora": DATA,
    "finetune-minilm": CLASSIFIER,
    "classify-csv": [*CLASSIFIER, "evaluation.every=null", "checkpoint.best=null"],
    "prune-distill-quantize": CLASSIFIER,
    "shrink-and-improve": CLASSIFIER,
    "digits": IMAGES,
    "images": [*IMAGES, "data.source=digits", "evaluation.every=null", "checkpoint.best=null"],
    "rigl": IMAGES,
    "grow-improve-shrink": IMAGES,
}


def small(name: str) -> Recipe:
    """The shipped recipe of this name, made small."""
    return load_recipe(name, CHANGES[name])


def leave_models(folder: Path) -> None:
    """Fill a folder in which these recipes run: texts, and what quickstart and finetune-minilm leave, untrained."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    (folder / "texts.txt").write_text("".join(f"def line_{n}(x): return x * {n % 7} + {n}\n" for n in range(300)))
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(60)]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    leave_own_data(folder, classes=10)
    with chdir(folder):
        task = build_task(small("quickstart"), workdir=folder)
    model, tokens = folder / "runs/quickstart/model", folder / "runs/finetune-minilm/model"
    task.module.model.save_pretrained(model)  # type: ignore[operator, union-attr]
    task.tokenizer.save_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=10, **sizes)
    BertForSequenceClassification(config).save_pretrained(tokens)
    tokenizer.save_pretrained(tokens)


def leave_own_data(folder: Path, classes: int = 2) -> None:
    """What shipped recipes want of a user: rows with labels, and a folder of images for each class, to be planned."""
    rows = "".join(f"row {n} of {n % classes},{n % classes}\n" for n in range(200))
    (folder / "rows.csv").write_text(f"text,label\n{rows}")
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "images" / name / "1.png").touch()
