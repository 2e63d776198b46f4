"""What is predicted of a row: one class, several, or a number; how classes are weighed, and what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import classification_report, confusion_matrix, f1_score, r2_score

from shoestring.trainer.cli.class_display import matrix_lines
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.data.receipt import receipt
from shoestring.trainer.tasks import Task
from shoestring.trainer.tasks.problems import MultiLabel, Regression, SingleLabel

WORDS = ("river", "stone", "cloud", "flame")


def task(tiny: Any, rows: list[dict[str, Any]], folder: Path, **model: Any) -> Task:
    """A small BERT on these rows."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = {"source": str(path), "limit": None, "validation": 0.25, "sequence_length": 16, "batch_size": 8}
    shape = {**tiny.llama, "model_type": "bert"}
    return tiny.task(model={"task": "sequence-classification", "config": shape, **model}, data=data)


def predictions(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of all held-out rows, one at a time."""
    module = task.module.eval()
    rows = [task.collate([task.validation[i]]) for i in range(len(task.validation))]
    with torch.no_grad():
        return torch.cat([module(row) for row in rows]), torch.cat([row["labels"] for row in rows])


def test_one_class_is_measured_as_scikit_learn_does(tiny: Any, tmp_path: Path) -> None:
    rows = [{"text": f"a {WORDS[i % 7 % 4]} {i}", "label": WORDS[i % 7 % 4]} for i in range(120)]
    weighed = task(tiny, rows, tmp_path, class_weights="balanced")
    tiny.fit(weighed, 12)
    metrics = tiny.validate(weighed)
    logits, labels = predictions(weighed)
    predicted, names = logits.argmax(-1), sorted(WORDS)
    assert metrics["val_accuracy"] == pytest.approx((predicted == labels).double().mean().item())
    for kind in ("macro", "micro"):
        assert metrics[f"val_{kind}_f1"] == pytest.approx(f1_score(labels, predicted, average=kind), abs=1e-6)
    plain = torch.nn.functional.cross_entropy(logits, labels)
    assert metrics["val_loss"] == pytest.approx(plain.item(), rel=1e-5), "validation weighs all rows alike"
    theirs = classification_report(labels, predicted, target_names=names, output_dict=True, zero_division=0)
    for name in names:
        ours = weighed.details["classes"][name]
        assert list(ours.values()) == pytest.approx(list(theirs[name].values()))
    assert np.array_equal(weighed.details["confusion_matrix"], confusion_matrix(labels, predicted))


def test_classes_weigh_by_the_whole_data(tiny: Any, tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": "rare" if i % 5 == 0 else "usual"} for i in range(40)]
    balanced = task(tiny, rows, tmp_path, class_weights="balanced")
    weights = balanced.module.problem.weights(torch.tensor([0, 1]))
    labels = balanced.train.labels
    assert weights[0] * (labels == 0).sum() == pytest.approx(float(weights[1] * (labels == 1).sum()))
    assert balanced.module.problem.weights(labels).mean() == pytest.approx(1.0)
    one, other = (task(tiny, rows, tmp_path, class_weights=wanted).module.problem for wanted in ([4, 1], [8, 2]))
    assert torch.allclose(one.weights(labels), other.weights(labels)), "only their ratio counts"
    batch = balanced.collate([balanced.train[i] for i in range(8)])
    module = balanced.module.eval()
    by_hand = torch.nn.functional.cross_entropy(module(batch), batch["labels"], reduction="none")
    by_hand = (by_hand * weights[batch["labels"]]).mean()
    assert module.training_step(batch, 0).item() == pytest.approx(by_hand.item(), rel=1e-6)
    with pytest.raises(TaskError, match=r"class_weights: found 3 weights; the data has 2 classes.*: rare, usual"):
        task(tiny, rows, tmp_path, class_weights=[1, 2, 3])


def test_several_classes_of_a_row(tiny: Any, tmp_path: Path) -> None:
    def words(i: int) -> list[str]:
        return [word for bit, word in enumerate(WORDS) if i >> bit & 1]

    rows: list[dict[str, Any]] = [{"text": f"{' and '.join(words(i))} there", "label": words(i)} for i in range(128)]
    rows[1]["label"], rows[3]["label"], rows[2]["label"] = "river", "stone,river", '["stone"]'
    several = task(tiny, rows, tmp_path, problem="multi-label")
    assert several.facts["classes"] == sorted(WORDS) and several.train.labels.shape == (len(several.train), 4)
    tiny.fit(several, 60)
    metrics = tiny.validate(several)
    logits, labels = predictions(several)
    predicted = (logits > 0).long()
    for kind in ("macro", "micro"):
        ours = metrics[f"val_{kind}_f1"]
        assert ours == pytest.approx(f1_score(labels, predicted, average=kind, zero_division=0), abs=1e-6)
    assert metrics["val_exact_match"] == pytest.approx((predicted == labels).all(-1).double().mean().item())
    assert metrics["val_micro_f1"] > 0.6, "nothing was learnt"
    assert several.module.model.config.problem_type == "multi_label_classification"
    shown = receipt(several.prepared)
    assert shown.classes == dict(zip(sorted(WORDS), several.train.labels.sum(0).int().tolist(), strict=True))
    assert shown.shown[0][-1][0].startswith(" → ")


def test_a_number_of_a_row(tiny: Any, tmp_path: Path) -> None:
    rows = [{"text": f"{i} is {WORDS[i % 4]}", "label": str(i % 4 / 2)} for i in range(96)]
    number = task(tiny, rows, tmp_path, problem="regression")
    assert number.module.model.config.num_labels == 1 and "classes" not in number.facts
    tiny.fit(number, 120)
    metrics = tiny.validate(number)
    logits, labels = predictions(number)
    errors = (logits[:, 0] - labels).double()
    assert (
        metrics["val_loss"]
        == pytest.approx(metrics["val_mse"])
        == pytest.approx(errors.square().mean().item(), rel=1e-5)
    )
    assert metrics["val_mae"] == pytest.approx(errors.abs().mean().item(), rel=1e-5)
    assert metrics["val_r2"] == pytest.approx(r2_score(labels, logits[:, 0]), abs=1e-4)
    assert metrics["val_spearman"] == pytest.approx(spearmanr(labels, logits[:, 0]).statistic, abs=1e-4)
    assert metrics["val_r2"] > 0.5, "nothing was learnt"
    assert receipt(number.prepared).shown[0][-1][0].startswith(" → ")


@pytest.mark.parametrize(
    ("problem", "label", "said"),
    [
        ("regression", "tall", r"row 3 is a str, found tall; model\.problem: regression needs a number"),
        ("regression", "nan", "needs a number"),
        ("regression", True, "is true or false"),
        ("multi-label", 4, r"row 3 is a number, found 4; classes are a list"),
        ("multi-label", [["a"]], "a class is a text or a whole number"),
        ("single-label", ["a", "b"], "row 3 is a list.*need model.problem: multi-label"),
        ("multi-label", None, "row 3 has no label"),
    ],
)
def test_a_label_of_another_kind_is_named(tiny: Any, tmp_path: Path, problem: str, label: Any, said: str) -> None:
    good = {"regression": 1.5, "multi-label": ["a"], "single-label": "a"}[problem]
    rows = [{"text": f"row {i}", "label": label if i == 2 else good} for i in range(8)]
    with pytest.raises(TaskError, match=said):
        task(tiny, rows, tmp_path, problem=problem)


def test_metrics_of_next_to_nothing() -> None:
    """No sample of a class, a single sample: a figure or none at all, and no warning."""
    one = SingleLabel(["a", "b", "c"])
    metric = one.metric()
    one.update(metric, torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]))
    scores, details = one.scores(metric)
    assert scores["macro_f1"] == 1.0 and details["classes"]["c"]["samples"] == 0
    number = Regression()
    metric = number.metric()
    number.update(metric, torch.tensor([[2.0]]), torch.tensor([1.0]))
    assert {name: value.item() for name, value in number.scores(metric)[0].items()} == {"mse": 1.0, "mae": 1.0}
    several = MultiLabel(["a", "b"])
    metric = several.metric()
    several.update(metric, torch.tensor([[0.9, -0.1]]), torch.tensor([[1.0, 0.0]]))
    assert several.scores(metric)[0]["exact_match"] == 1.0, "logits between 0 and 1 are no probabilities"


def test_the_matrix_as_text() -> None:
    assert matrix_lines(["a", "long"], [[10, 0], [3, 4]]) == ["a     10 .", "long   3 4"]
