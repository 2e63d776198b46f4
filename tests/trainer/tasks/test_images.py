"""Images in folders, one for each class, with our own models and those of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from shoestring.recipes import RecipeError, recipe_from
from shoestring.trainer import fit, plan
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.export.trained import open_run
from shoestring.trainer.export.write import export

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore")
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
       "intermediate_size": 32, "patch_size": 4}  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scikit-learn's handwritten 0, 1 and 2 as files."""
    root = tmp_path_factory.mktemp("digits")
    bunch = load_digits(n_class=3)
    for number, (pixels, label) in enumerate(zip(bunch.images[:150], bunch.target[:150], strict=True)):
        folder = root / ("zero", "one", "two")[label]
        folder.mkdir(exist_ok=True)
        Image.fromarray((pixels * 15).astype(np.uint8)).save(folder / f"{number}.png")
    return root


def values(source: Path, config: dict[str, Any], **data: Any) -> dict[str, Any]:
    return {
        "model": {"task": "image-classification", "config": config},
        "data": {"source": str(source), "validation": 0.2, "batch_size": 16, "image_size": 16, **data},
        "budget": {"steps": 40}, "optimizer": {"lr": 5e-3}, "strategy": {"name": "single"},
        "tracking": {"ledger": False},
    }  # fmt: skip


@pytest.mark.parametrize("config", [{"kind": "cnn", "channels": [8, 8]}, VIT], ids=["cnn", "vit"])
def test_images_are_learnt(config: dict[str, Any], digits: Path, tmp_path: Path) -> None:
    report = fit(plan(recipe_from(values(digits, config), "r")), run_dir=tmp_path / "run")
    assert report is not None and (config is VIT or report.summary["metrics"]["val_macro_f1"] > 0.6), "chance is 0.33"
    assert list(report.details["classes"]) == ["one", "two", "zero"]
    trained = open_run(tmp_path / "run")
    sample = trained.task.train[0]
    assert sample["pixel_values"].shape == (3, 16, 16) and sample["pixel_values"].abs().max() <= 1
    file = trained.task.train.files[0]
    assert file.parent.name == ["one", "two", "zero"][int(sample["labels"])]
    by_hand = np.asarray(Image.open(file).convert("RGB").resize((16, 16)), dtype=np.float32) / 127.5 - 1
    assert torch.allclose(sample["pixel_values"], torch.from_numpy(by_hand.transpose(2, 0, 1)), atol=1e-6)
    if config is VIT:
        assert export(trained, "hf", out=tmp_path / "out").error == 0
        again = {**values(digits, {}), "model": {"task": "image-classification", "name": str(tmp_path / "out")}}
        assert fit(plan(recipe_from({**again, "budget": {"steps": 1}}, "r")), run_dir=tmp_path / "again") is not None
        other = recipe_from({**again, "data": {**again["data"], "image_size": 12}}, "r")
        with pytest.raises(TaskError, match="images are 12 pixels wide, and the model takes 16"):
            fit(plan(other), run_dir=tmp_path / "other")


def test_what_is_no_folder_of_images_is_named(digits: Path, tmp_path: Path) -> None:
    cnn = {"kind": "cnn"}
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for source, said in (
        (tmp_path / "absent", "is no folder here"), (tmp_path / "images", "has 1 folders"),
        (digits / "one", "has 0 folders"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=said):
            plan(recipe_from(values(source, cnn), "r"))
    (tmp_path / "images" / "dog").mkdir()
    with pytest.raises(RecipeError, match=r"cat has no image; images end in \.png"):
        plan(recipe_from(values(tmp_path / "images", cnn), "r"))
    for name in ("cat", "dog"):
        (tmp_path / "images" / name / "a.png").write_bytes(b"no image")
    with pytest.raises(TaskError, match=r"cat/a\.png is no image that can be read"):
        fit(plan(recipe_from(values(tmp_path / "images", cnn, validation=0), "r")), run_dir=tmp_path / "run")
    with pytest.raises(RecipeError, match="both name and config"):
        recipe_from({**values(digits, cnn), "model": {"task": "image-classification", "name": "x", "config": cnn}}, "r")
    with pytest.raises(RecipeError, match="or with the model_type of a Hugging Face model"):
        recipe_from(values(digits, {"hidden": [3]}), "r")
