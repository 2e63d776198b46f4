"""Adapters are saved without the frozen weights that their model is built from; those are compared instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import adapted
import peft
import pytest
import torch
from processes import succeed
from safetensors.torch import load_file, save_file
from toy import Exploded

from shoestring.trainer import fit, plan
from shoestring.trainer.checkpoint import format as checkpoint
from shoestring.trainer.checkpoint.base import AnotherBase
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.export.measure_target import open_target
from shoestring.trainer.export.trained import open_run

pytestmark = pytest.mark.filterwarnings("ignore")

EIGHT_MILLION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 7}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapted.pretrained(tmp_path_factory.mktemp("base") / "llama", **EIGHT_MILLION)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def adapters(run_dir: Path) -> bytes:
    """As PEFT names them."""
    return (run_dir / "final" / "adapter_model.safetensors").read_bytes()


def kinds(run_dir: Path) -> set[str]:
    newest, _ = checkpoint.newest_intact(run_dir / "checkpoints")
    assert newest is not None
    return {key.partition("/")[0] for key in checkpoint.Pieces(newest)}


@pytest.mark.parametrize("named", [True, False], ids=["pretrained", "from config"])
def test_adapters_alone_are_saved_and_resume_to_the_bit(named: bool, base: Path, tmp_path: Path) -> None:
    config = {"model_type": "llama", **adapted.SHAPE, **EIGHT_MILLION}
    adapted.whole_and_resumed(tmp_path, {"name": str(base)} if named else {"config": config}, "single")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert json.loads((broken / "summary.json").read_text())["resumed_from"] == 4
    assert adapters(whole) == adapters(broken)
    assert all("lora_" in name for name in load_weights(whole / "final") if "rotary" not in name)
    assert "frozen" not in kinds(whole)
    assert max(map(bytes_of, (whole / "checkpoints").glob("0*"))) < 300_000
    if named:
        model = open_run(whole).as_run.eval()
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(whole / "final").eval()
        ids = torch.arange(1, 17)[None]
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    target = open_target(str(whole))
    assert target.trained is not None and sum(p.numel() for p in target.trained.model.parameters()) > 7_500_000
    assert target.bytes > 4 * 7_500_000, "the base is a part of the model all the same"


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_ranks_resume_adapters_to_the_bit(strategy: str, base: Path, tmp_path: Path) -> None:
    succeed(adapted.whole_and_resumed, tmp_path, {"name": str(base)}, strategy, world=2, folder=tmp_path / "logs")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert json.loads((broken / "summary.json").read_text())["resumed_from"] == 4
    assert adapters(whole) == adapters(broken)
    assert "frozen" not in kinds(whole) and "base" in checkpoint.read_manifest(whole / "checkpoints" / "000000006")


def test_another_base_is_refused(tmp_path: Path) -> None:
    name = adapted.pretrained(tmp_path / "llama")
    given = adapted.recipe(tmp_path, {"name": str(name)})
    with pytest.raises(Exploded):
        fit(plan(given), run_dir=tmp_path / "run", callbacks=[adapted.Crash(3)])
    fit(plan(given), run_dir=tmp_path / "finished")
    weights = load_file(name / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1e-3
    save_file(weights, name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AnotherBase, match=r"000000002 holds what was trained beside the frozen weights of .*llama \("):
        fit(plan(given), run_dir=tmp_path / "run")
    with pytest.raises(AnotherBase, match=r"final holds"):
        open_run(tmp_path / "finished")
    adapted.pretrained(name)
    report = fit(plan(given), run_dir=tmp_path / "run")
    assert report is not None and report.summary["resumed_from"] == 2


def test_a_base_that_a_technique_may_change_is_saved(tmp_path: Path) -> None:
    name = adapted.pretrained(tmp_path / "llama")
    given = adapted.recipe(tmp_path, {"name": str(name)}, techniques=[{"gradual_pruning": {"sparsity": 0.5}}])
    fit(plan(given), run_dir=tmp_path / "run")
    assert "frozen" in kinds(tmp_path / "run")
    shutil.rmtree(name)
    adapted.pretrained(name, seed=1)
    weights = dict(open_run(tmp_path / "run").task.module.named_parameters())
    saved = load_weights(tmp_path / "run" / "final")
    assert all(torch.equal(weights[name], value) for name, value in saved.items() if name in weights)


def test_frozen_weights_that_no_file_has_are_saved(tmp_path: Path) -> None:
    """A classifier's pooler, where the files are those of a masked language model."""
    given = adapted.classes_beside(tmp_path)
    fit(plan(given), run_dir=tmp_path / "run")
    newest, _ = checkpoint.newest_intact(tmp_path / "run" / "checkpoints")
    assert newest is not None
    frozen = [key for key in checkpoint.Pieces(newest) if key.startswith("frozen/")]
    assert any("pooler" in key for key in frozen) and not any("embeddings" in key for key in frozen)
    assert open_run(tmp_path / "run").kind == "sequence-classification"
