"""Adapters beside a low-bit base, from the recipe to the file: merged as trained, and on their own for PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapted
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shoestring.trainer import fit, plan
from shoestring.trainer.export.candidates import Candidate, low_rank
from shoestring.trainer.export.compress import Limits, search
from shoestring.trainer.export.measure_target import open_target
from shoestring.trainer.export.measurement import MeasureOptions, measure
from shoestring.trainer.export.quality import quality
from shoestring.trainer.export.runtimes import eager, relative_error, sample
from shoestring.trainer.export.trained import CannotExport, open_run
from shoestring.trainer.export.write import export
from shoestring.trainer.tasks.quantized import QuantizedLinear

pytestmark = pytest.mark.filterwarnings("ignore")
LORA = {"kind": "lora", "rank": 2, "alpha": 64.0}
FAST = {"optimizer": {"lr": 3e-2}, "budget": {"steps": 4}, "precision": "bf16"}


def run(home: Path, model: dict[str, Any]) -> Path:
    given = adapted.recipe(home, {"adapter": LORA, **model}, **FAST)
    fit(plan(given), run_dir=home / "run")
    return home / "run"


@pytest.mark.parametrize(("dtype", "named"), [("nf4", True), ("nf4", False), ("bf16", False), ("int8", True)])
def test_a_run_beside_few_bits_is_exported_as_it_was_trained(dtype: str, named: bool, tmp_path: Path) -> None:
    config = {"model_type": "llama", **adapted.SHAPE}
    made = {"name": str(adapted.pretrained(tmp_path / "base"))} if named else {"config": config}
    run_dir = run(tmp_path, {"dtype": dtype, **made})
    trained = open_run(run_dir)
    base = trained.as_run.base_model.model.model.layers[0].mlp.up_proj  # type: ignore[union-attr]
    assert isinstance(base.base_layer, QuantizedLinear) == (dtype != "bf16")
    batch = sample(trained)
    apart = eager(trained.as_run.eval())(batch)
    merged = export(trained, "hf", out=tmp_path / "hf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert relative_error(eager(loaded.eval())(batch), apart, batch) < 1e-5
    assert merged.error == 0
    onnx = export(open_run(run_dir), "onnx", out=tmp_path / "onnx")
    assert onnx.error < 1e-4
    alone = export(open_run(run_dir), "peft", out=tmp_path / "peft")
    assert alone.error < 1e-5 and alone.bytes < merged.bytes / 4
    assert any("trained beside" in note for note in alone.notes) == (dtype != "bf16")
    weights = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights) and {t.dtype for t in weights.values()} == {torch.float32}


def test_peft_loads_the_adapters_on_the_model_that_others_have(tmp_path: Path) -> None:
    import peft

    name = adapted.pretrained(tmp_path / "base")
    trained = open_run(run(tmp_path, {"name": str(name), "dtype": "nf4"}))
    export(trained, "peft", out=tmp_path / "peft")
    whole = AutoModelForCausalLM.from_pretrained(name)
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "peft")).base_model_name_or_path == str(name)
    put_on = peft.PeftModel.from_pretrained(whole, str(tmp_path / "peft")).eval()
    batch = sample(trained)
    near = relative_error(eager(put_on)(batch), eager(trained.model)(batch), batch)
    assert 1e-4 < near < 0.3, "the whole base in the place of the rounded one"


@pytest.mark.parametrize(
    ("model", "said"),
    [({"adapter": None}, "has trained no adapter"), ({"adapter": {**LORA, "start": "pissa"}}, "pissa")],
)
def test_what_is_no_adapter_on_its_own_is_refused(model: dict[str, Any], said: str, tmp_path: Path) -> None:
    run_dir = run(tmp_path, {"config": {"model_type": "llama", **adapted.SHAPE}, **model})
    with pytest.raises(CannotExport, match=said):
        export(open_run(run_dir), "peft", out=tmp_path / "peft")
    assert export(open_run(run_dir), "hf", out=tmp_path / "hf").error == 0


@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
def test_a_run_with_adapters_is_measured_and_compressed_merged(dtype: str, tmp_path: Path) -> None:
    """What it is worth is what it was worth with its adapters apart; what it takes are its adapters and their base."""
    run_dir = run(tmp_path, {"dtype": dtype, "name": str(adapted.pretrained(tmp_path / "base"))})
    apart = quality(eager(open_run(run_dir).as_run.eval()), open_run(run_dir))["loss"]
    options = MeasureOptions(backends=("eager",), shapes=((1, 8),), memory=False, rounds=1)
    measured = measure(str(run_dir), options)
    assert measured["loss"] == pytest.approx(apart, rel=1e-5)
    parameters = 320 * 64 * 2 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert measured["parameters"] == parameters
    kept = measured["bytes"] / parameters
    assert 4 < kept < 4.5 if dtype == "fp32" else 1 < kept < 1.5, "embeddings and output layer are whole"
    ways = (
        Candidate(name="float32"), Candidate(name="int8", quantize="int8"),
        Candidate(name="rank", quantize="float16", change=low_rank(0.9)),
    )  # fmt: skip
    table = search(open_run(run_dir), Limits(bytes=1e9), candidates=ways, out=tmp_path / "small", shape=(1, 8))
    before, whole, int8, rank = (*table.before, *table.tried)
    assert before.bytes == measured["bytes"] and before.loss == whole.loss == pytest.approx(apart, rel=1e-5)
    assert int8.bytes < whole.bytes / 3 and int8.loss == pytest.approx(apart, rel=1e-2)
    assert rank.problem is None and rank.bytes < whole.bytes / 2
    assert table.chosen == min(table.tried, key=lambda tried: (tried.loss, tried.bytes)).name
    again = open_target(str(tmp_path / "small"))
    assert quality(eager(again.model), again.trained)["loss"] == pytest.approx(
        min(t.loss for t in table.tried), rel=1e-5
    )
