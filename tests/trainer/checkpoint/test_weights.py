"""Final weights: a folder that transformers loads, in parts that ranks write in turn, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapted
import pytest
import small
import torch
import transformers
import weights_ranks
from processes import succeed
from safetensors.torch import load_file

from shoestring.recipes import recipe_from
from shoestring.trainer import Budget, fit, plan
from shoestring.trainer.checkpoint import weights
from shoestring.trainer.checkpoint.weights import load_weights, weights_digest, weights_problem
from shoestring.trainer.export.trained import open_run

pytestmark = pytest.mark.filterwarnings("ignore")


def recipe(home: Path, **sections: Any) -> Any:
    given = adapted.recipe(home, {"config": {"model_type": "llama", **adapted.SHAPE}}, **sections).model_dump(
        mode="json"
    )
    given["model"]["adapter"] = None
    return recipe_from(given, "whole")


def test_transformers_loads_them_as_they_are(tmp_path: Path) -> None:
    fit(plan(recipe(tmp_path)), run_dir=tmp_path / "run")
    folder = tmp_path / "run" / "final"
    model = open_run(tmp_path / "run").model
    theirs, said = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def f0(): return 1", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


def test_what_only_we_can_load_has_no_settings_beside_it(tmp_path: Path) -> None:
    """Factors of layers, under names that transformers would pass over."""
    given = recipe(tmp_path, techniques=[{"low_rank": {"keep_factors": True}}])
    fit(plan(given), run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "final" / "config.json").exists()
    open_run(tmp_path / "run")


def test_one_file_is_found_by_who_reads_one_file(tmp_path: Path) -> None:
    small.train(tmp_path / "run", max_steps=1)
    link = tmp_path / "run" / "final.safetensors"
    one, kept = load_file(link), load_weights(tmp_path / "run" / "final")
    assert one.keys() == kept.keys() and all(torch.equal(one[name], kept[name]) for name in kept)


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_ranks_write_parts_in_turn(strategy: str, tmp_path: Path) -> None:
    """The parts hold what one file holds, each was written by one rank, and transformers finds them."""
    succeed(weights_ranks.main, strategy, tmp_path, world=2, folder=tmp_path / "logs", timeout=120)
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    together, alone = load_weights(parts), load_weights(whole)
    assert not parts.with_suffix(".safetensors").exists(), "which is what a link to one file is called"
    assert together.keys() == alone.keys() and all(torch.equal(together[name], alone[name]) for name in alone)
    files = json.loads((parts / "weights.json").read_text())["files"]
    assert len(files) > 4 and weights_problem(parts) is None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(parts).state_dict()
    assert all(torch.equal(theirs[name.removeprefix("model.")], value) for name, value in alone.items())
    held = [json.loads((tmp_path / f"held-{rank}.json").read_text()) for rank in range(2)]
    assert all(0 < most <= weights_ranks.PART for most in held), "bytes of parts that a rank had at once"
    first, second = (set(json.loads((tmp_path / f"wrote-{rank}.json").read_text())) for rank in range(2))
    assert first and second and not first & second and first | second == files.keys()


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that was there is found under the name that it had just then."""
    trainer = small.train(tmp_path, Budget(steps=2))
    final, before = tmp_path / "final", load_weights(tmp_path / "final")
    digest = weights_digest(final)
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if path.name == "final.writing":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with torch.no_grad():
        trainer.lightning_module.net.weight.zero_()
    with pytest.raises(KeyboardInterrupt):
        weights.save_weights(trainer, trainer.lightning_module, final, weights_ranks.Alone())
    monkeypatch.undo()
    assert not final.exists() and weights_problem(final) is None and weights_digest(final) == digest
    assert torch.equal(load_weights(final)["net.weight"], before["net.weight"])
    assert weights.save_weights(trainer, trainer.lightning_module, final, weights_ranks.Alone()) is None
    assert final.exists() and not load_weights(final)["net.weight"].any()
    assert sorted(p.name for p in tmp_path.glob("final*")) == ["final", "final.safetensors"]
