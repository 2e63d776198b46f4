"""`export --quantize trained`: what is written is the model that the run's own validation has judged."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import command
from finished import LANGUAGE, RECIPES, finished

from shoestring.recipes import recipe_from
from shoestring.trainer import fit, plan
from shoestring.trainer.export import torch_file
from shoestring.trainer.export.compress import Limits, search
from shoestring.trainer.export.measure_target import open_target
from shoestring.trainer.export.quality import quality
from shoestring.trainer.export.runtimes import eager
from shoestring.trainer.export.trained import CannotExport, open_run
from shoestring.trainer.export.write import export

pytestmark = pytest.mark.filterwarnings("ignore")

PRUNED = {"gradual_pruning": {"sparsity": 0.8}}
AWARE: dict[str, list[dict[str, Any]]] = {
    "w4 in groups": [{"quantization_aware": {"weight_bits": 4, "group_size": 16, "scale": "mse"}}],
    "w2 learned": [{"quantization_aware": {"weight_bits": 2, "scale": "lsq"}}],
    "w3 but one": [{"quantization_aware": {"weight_bits": 3, "skip": ["*layers.4.*"]}}],
    "w5 pruned": [PRUNED, {"quantization_aware": {"weight_bits": 5}}],
    "w8": [{"quantization_aware": {"weight_bits": 8}}],
    "4 values": [{"weight_clustering": {"clusters": 4, "every": 20}}],
    "13 values": [{"weight_clustering": {"clusters": 13, "every": 20}}],
    "9 values pruned": [PRUNED, {"weight_clustering": {"clusters": 9, "keep_zero": True, "every": 20}}],
    "w8 a8": [{"quantization_aware": {"weight_bits": 8, "activation_bits": 8}}],
    "w4 a8 but one": [{"quantization_aware": {"weight_bits": 4, "activation_bits": 8, "skip": ["*layers.4.*"]}}],
}
WEIGHTS_ALONE = [name for name in AWARE if "a8" not in name]


@cache
def trained_by(name: str, home: Path) -> tuple[Path, float]:
    """(the finished run's directory, the loss of its own last validation)."""
    values = {**RECIPES["digits"], "techniques": AWARE[name], "strategy": {"name": "single"}, "optimizer": {"lr": 5e-3}}
    report = fit(plan(recipe_from(values, "aware")), run_dir=home / "as-trained" / name)
    assert report is not None
    return report.run_dir, report.summary["metrics"]["val_loss"]


def loss_of(folder: Path | str) -> float:
    target = open_target(str(folder))
    assert target.trained is not None
    return float(quality(target.logits_function(target.backends()[0]), target.trained)["loss"])


def is_weight(part: torch.Tensor) -> bool:
    return part.ndim == 2


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", WEIGHTS_ALONE)
def test_the_file_computes_what_the_run_has_validated(name: str, sparse: bool, runs: Path, tmp_path: Path) -> None:
    run_dir, validated = trained_by(name, runs)
    trained = open_run(run_dir)
    made = export(trained, "torch", out=tmp_path / "out", quantize="trained", sparse=sparse)
    assert made.error == 0
    assert len(trained.ways) == (1 if "but one" in name else 2)
    assert loss_of(tmp_path / "out") == pytest.approx(validated, rel=2e-6)
    export(trained, "torch", out=tmp_path / "full")
    if "values" not in name and name != "w2 learned":  # their weights are what was validated, and on the grid already
        assert abs(loss_of(tmp_path / "full") - validated) > 1e-5 * validated

    path = tmp_path / "out" / torch_file.NAME
    block = re.search(r"\n(    import json.*?)\n\n(?=Tied)", str(torch_file.__doc__), re.S)
    assert block
    names: dict[str, Any] = {}
    exec("\n".join(line[4:] for line in block[1].splitlines()), names)
    documented, ours = names["load"](path), torch_file.read(path)
    assert documented.keys() == ours.keys()
    assert all(torch.equal(documented[each], ours[each]) for each in ours)


@pytest.mark.parametrize(("name", "bits", "overhead"), [
    ("w4 in groups", 4, lambda out, inputs: out * inputs // 16 * 4), ("w2 learned", 2, lambda out, inputs: out * 4),
    ("w8", 8, lambda out, inputs: out * 4), ("4 values", 2, lambda out, inputs: 4 * 4),
    ("13 values", 4, lambda out, inputs: 13 * 4),
])  # fmt: skip
def test_bytes_are_those_of_the_bits(name: str, bits: int, overhead: Any, runs: Path) -> None:
    trained = open_run(trained_by(name, runs)[0])
    encoded = torch_file.encoded_tensors(trained.model, "trained", False, trained.ways)
    bytes_of = {name: sum(part.nbytes for part in parts.values()) for name, _, parts in encoded}
    shapes = {name: p.shape for name, p in trained.model.named_parameters() if is_weight(p)}
    assert shapes and shapes.keys() == trained.ways.keys()
    for weight, (out, inputs) in shapes.items():
        assert bytes_of[weight] == -(-out * inputs * bits // 8) + overhead(out, inputs)


def test_zeros_of_a_pruned_grid_take_a_bit_each(runs: Path, tmp_path: Path) -> None:
    trained = open_run(trained_by("w5 pruned", runs)[0])
    encoded = torch_file.encoded_tensors(trained.model, "trained", True, trained.ways)
    for name, how, parts in encoded:
        if how["sparse"]:
            kept = int((trained.ways[name].rounded(trained.model.get_parameter(name)) != 0).sum())
            size = trained.model.get_parameter(name).numel()
            assert parts[":mask"].nbytes + parts[":kept"].nbytes == -(-size // 8) + -(-kept * 5 // 8)
            break
    else:
        pytest.fail("no weight was stored sparse")


def test_int8_products_in_onnx_runtime(runs: Path, tmp_path: Path) -> None:
    import onnx

    for name, whole, products in (("w8 a8", 0, 2), ("w4 a8 but one", 1, 1)):
        run_dir, validated = trained_by(name, runs)
        made = export(open_run(run_dir), "onnx", out=tmp_path / name, quantize="trained")
        assert made.error <= made.tolerance
        nodes = [node.op_type for node in onnx.load(str(tmp_path / name / "model.onnx")).graph.node]
        assert (nodes.count("MatMulInteger"), nodes.count("MatMul") + nodes.count("Gemm")) == (products, whole)
        assert loss_of(tmp_path / name) == pytest.approx(validated, rel=0.02)
    plain = export(open_run(run_dir), "onnx", out=tmp_path / "int8", quantize="int8")  # 255 levels in place of 15
    assert made.from_original > 2 * plain.from_original


def adapted(home: Path, adapters: str, runs: Path) -> tuple[Path, float]:
    base = export(open_run(finished("llama", runs)), "hf", out=home / "base")
    values = {
        "model": {"task": "causal-lm", "name": base.path, "adapter": {"rank": 2}},
        "data": LANGUAGE, "budget": {"steps": 6}, "optimizer": {"lr": 1e-2}, "strategy": {"name": "single"},
        "techniques": [{"quantization_aware": {"weight_bits": 3, "group_size": 16, "adapters": adapters}}],
    }  # fmt: skip
    report = fit(plan(recipe_from(values, "adapted")), run_dir=home / "run")
    assert report is not None
    return report.run_dir, report.summary["metrics"]["val_loss"]


@pytest.mark.parametrize("adapters", ["apart", "merged"])
def test_adapters_stay_beside_low_bit_weights_or_become_part_of_them(adapters: str, runs: Path, tmp_path: Path) -> None:
    run_dir, validated = adapted(tmp_path, adapters, runs)
    trained = open_run(run_dir)
    merged = eager(trained.model)  # used before: what is apart must still be
    made = export(trained, "torch", out=tmp_path / "out", quantize="trained")
    assert made.error == 0 and loss_of(tmp_path / "out") == pytest.approx(validated, rel=2e-5)
    names = torch_file.read(tmp_path / "out" / torch_file.NAME)
    assert any("lora_A" in name for name in names) == (adapters == "apart")
    judged = open_run(run_dir)
    assert abs(float(quality(merged, judged)["loss"]) - validated) > 1e-4
    if adapters == "apart":
        with pytest.raises(CannotExport, match="hf holds one matrix for both"):
            export(trained, "hf", out=tmp_path / "hf", quantize="trained")
    else:
        made = export(trained, "hf", out=tmp_path / "hf", quantize="trained")
        assert made.error == 0 and loss_of(tmp_path / "hf") == pytest.approx(validated, rel=2e-5)


def test_compress_tries_it(runs: Path, tmp_path: Path) -> None:
    trained = open_run(trained_by("w2 learned", runs)[0])
    limit = 1.02 * export(trained, "torch", out=tmp_path / "alone", quantize="trained").files["model.safetensors"]
    result = search(trained, Limits(bytes=limit), out=tmp_path / "out")
    assert result.chosen == "as trained"
    assert loss_of(tmp_path / "out") == pytest.approx(trained_by("w2 learned", runs)[1], rel=2e-6)
    few = search(open_run(trained_by("w8 a8", runs)[0]), Limits(bytes=1e9), out=tmp_path / "both").tried
    fast = next(t for t in few if t.name == "onnx as trained")
    assert fast.problem is None and fast.loss == pytest.approx(trained_by("w8 a8", runs)[1], rel=0.02)
    assert "onnx as trained" not in {t.name for t in result.tried}
    assert "as trained" not in {t.name for t in search(open_run(finished("digits", runs)), Limits(bytes=1e9),
                                                       out=tmp_path / "other").tried}  # fmt: skip


def test_low_rank_factors_are_on_a_grid_and_their_product_is_not(runs: Path, tmp_path: Path) -> None:
    values = {
        **RECIPES["digits"], "strategy": {"name": "single"}, "budget": {"steps": 10},
        "techniques": [{"low_rank": {"budget": 0.4}}, {"quantization_aware": {"weight_bits": 4}}],
    }  # fmt: skip
    fit(plan(recipe_from(values, "low-rank")), run_dir=tmp_path / "run")
    with pytest.raises(CannotExport, match="was not trained for low-bit weights"):
        export(open_run(tmp_path / "run"), "torch", out=tmp_path / "out", quantize="trained")


def test_the_command_says_what_is_missing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    aware, plain = trained_by("w4 in groups", runs)[0], finished("digits", runs)
    out = ["--out", str(tmp_path / "out")]
    for words, said in (
        ([str(plain), "--to", "torch", "--quantize", "trained"], "neither quantization_aware nor weight_clustering"),
        ([str(aware), "--to", "onnx", "--quantize", "trained"], "torch holds those"),
        ([str(aware), "--to", "gguf-ready-safetensors", "--quantize", "trained"], "does not store that"),
    ):
        assert command(monkeypatch, "export", *words, *out) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.strip().splitlines()) == 1 and said in error, error
    assert not (tmp_path / "out").exists()
    assert command(monkeypatch, "export", str(aware), "--to", "torch", *out, "--json") == 0
    assert "--quantize trained" in json.loads(capsys.readouterr().out)["notes"][0]
