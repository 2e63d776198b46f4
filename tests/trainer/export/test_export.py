"""Exports of real small models, read back by the runtimes they are for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import command
from finished import LANGUAGE, finished

from shoestring.trainer.export import encodings, hf, onnx_file, torch_file, write
from shoestring.trainer.export.runtimes import eager, relative_error, sample
from shoestring.trainer.export.trained import CannotExport, Trained, open_run
from shoestring.trainer.export.write import export

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def trained(request: pytest.FixtureRequest, runs: Path) -> Trained:
    return open_run(finished(request.param, runs))


def packs_documents(trained: Trained) -> bool:
    """Whether a row that exports are compared on holds two documents; that depends on the corpus."""
    position_ids = sample(trained).get("position_ids")
    return position_ids is not None and bool((position_ids[:, 1:] == 0).any())


# -- formats ---------------------------------------------------------------------------------------------------------
EVERYWHERE = [
    ("hf", None, False), ("torch", None, False), ("torch", None, True), ("torch", "int8", False),
    ("torch", "int8", True), ("torch", "int4", False), ("gguf-ready-safetensors", None, False),
]  # fmt: skip
ALL = [(model, *form) for model in ("llama", "gpt2", "bert") for form in EVERYWHERE]
# a trace takes seconds, and the classifier's is below
ALL += [("llama", "onnx", None, False), ("llama", "onnx", "int8", False), ("gpt2", "onnx", "int8", False)]


@pytest.mark.parametrize(("trained", "to", "quantize", "sparse"), ALL, indirect=["trained"])
def test_every_format_is_written_whole_and_computes_the_same(
    trained: Trained, to: str, quantize: str | None, sparse: bool, tmp_path: Path
) -> None:
    made = export(trained, to, out=tmp_path / "out", quantize=quantize, sparse=sparse)
    assert made.error <= made.tolerance
    assert (made.error == 0) or to == "onnx"
    files = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert made.bytes == sum((tmp_path / "out" / p).stat().st_size for p in files)
    assert {str(p) for p in files} == made.files.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    if not (to == "onnx" and packs_documents(trained)):  # positions are no input of a graph
        assert made.from_original < {None: 1e-2, "int8": 0.1, "int4": 0.5}[quantize]
    if quantize:
        assert made.from_original > 0


@pytest.mark.parametrize("trained", ["digits", "cnn"], indirect=True)
def test_image_models_go_to_torch_and_onnx_only(trained: Trained, tmp_path: Path) -> None:
    forms = (("torch", "int8"), ("onnx", None), ("onnx", "int8"))
    made = {form: export(trained, form[0], out=tmp_path / "-".join(map(str, form)), quantize=form[1]) for form in forms}
    assert all(one.error < 2e-2 for one in made.values())
    assert made["onnx", "int8"].files["model.onnx"] < made["onnx", None].files["model.onnx"]
    for to in ("hf", "gguf-ready-safetensors"):
        with pytest.raises(CannotExport, match=r"MLP|CNN"):
            export(trained, to, out=tmp_path / to)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["onnx-None", "onnx-int8", "torch-int8"]


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_loader_in_the_documentation_reads_every_torch_file(
    trained: Trained, quantize: str | None, sparse: bool, tmp_path: Path
) -> None:
    export(trained, "torch", out=tmp_path / "out", quantize=quantize, sparse=sparse)
    block = re.search(r"\n(    import json.*?)\n\n(?=Tied)", str(torch_file.__doc__), re.S)
    assert block
    names: dict[str, Any] = {}
    exec("\n".join(line[4:] for line in block[1].splitlines()), names)
    loaded = names["load"](tmp_path / "out" / torch_file.NAME)
    ours = torch_file.read(tmp_path / "out" / torch_file.NAME)
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[name], ours[name]) for name in ours)
    if quantize is None:
        state = trained.model.state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in loaded)


@pytest.mark.parametrize("trained", ["digits"], indirect=True)
def test_sparse_bytes_are_the_bitmask_formula(trained: Trained, tmp_path: Path) -> None:
    from safetensors import safe_open

    export(trained, "torch", out=tmp_path / "out", sparse=True, quantize="int8")
    weight = dict(trained.model.named_parameters())["layers.1.weight"]  # 64 x 64, 90 % pruned
    density = float((weight != 0).float().mean())
    assert 0.05 < density < 0.2
    with safe_open(tmp_path / "out" / torch_file.NAME, "pt") as file:
        parts = {key: file.get_tensor(key) for key in file.keys() if key.startswith("layers.1.weight:")}  # noqa: SIM118
    size = sum(part.numel() * part.element_size() for part in parts.values())
    kept = int((encodings.quantize_int8(weight)[0] != 0).sum())
    assert size == kept + 64 * 64 // 8 + 64 * 4


@pytest.mark.parametrize("trained", ["llama"], indirect=True)
def test_a_half_precision_folder_has_one_dtype_and_its_architecture(trained: Trained, tmp_path: Path) -> None:
    from safetensors import safe_open

    made = export(trained, "gguf-ready-safetensors", out=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118
        assert "model.layers.0.self_attn.q_proj.weight" in file.keys()  # noqa: SIM118
    assert any("get_vocab_base_pre" in note for note in made.notes)


@pytest.mark.parametrize("trained", ["bert"], indirect=True)
def test_onnx_takes_any_batch_and_length(trained: Trained, tmp_path: Path) -> None:
    from shoestring.trainer.export.runtimes import onnxruntime

    export(trained, "onnx", out=tmp_path / "plain")
    run = onnxruntime(tmp_path / "plain" / onnx_file.NAME)
    draw = torch.Generator().manual_seed(0)
    for rows, length in ((1, 2), (3, 17), (7, 64)):
        ids = torch.randint(2, 380, (rows, length), generator=draw)
        mask = torch.ones_like(ids)
        mask[-1, length // 2 + 1 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        assert relative_error(run(batch), eager(trained.model)(batch), batch) < 1e-4


# -- what is damaged shows -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("trained", ["digits"], indirect=True)
def test_an_export_that_computes_something_else_is_not_kept(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = torch_file.encode

    def wrong(tensor: torch.Tensor, *rest: Any) -> Any:
        return honest(tensor + 0.01, *rest)

    export(trained, "torch", out=tmp_path / "out")
    before = (tmp_path / "out" / torch_file.NAME).read_bytes()
    monkeypatch.setattr(torch_file, "encode", wrong)
    with pytest.raises(CannotExport, match="computes different numbers"):
        export(trained, "torch", out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / torch_file.NAME).read_bytes() == before


@pytest.mark.parametrize("trained", ["digits"], indirect=True)
def test_what_a_killed_export_left_is_cleared_and_what_it_had_renamed_is_back(trained: Trained, tmp_path: Path) -> None:
    made = export(trained, "torch", out=tmp_path / "out")
    dead = 2**22 + 1  # above what Linux gives to processes
    (tmp_path / "out").rename(tmp_path / f".out.old-{dead}")
    (tmp_path / f".out.writing-{dead}").mkdir()
    mine = tmp_path / ".out.writing-notes"
    mine.mkdir()
    write.clear_leftovers(tmp_path / "out")
    assert write.file_sizes(tmp_path / "out") == made.files
    assert sorted(p.name for p in tmp_path.iterdir()) == [mine.name, "out"]


@pytest.mark.parametrize("trained", ["digits"], indirect=True)
def test_other_peoples_folders_are_left_alone(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(CannotExport, match="was not written by an export"):
        export(trained, "torch", out=tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("trained", ["bert"], indirect=True)
def test_emulated_int8_is_not_the_plain_model(trained: Trained) -> None:
    batch = sample(trained)
    plain, int8 = eager(trained.model)(batch), onnx_file.expected(trained, onnx_file.Products())(batch)
    assert 0 < relative_error(int8, plain, batch) < 0.1


def test_eight_bit_activations_by_hand() -> None:
    x = torch.tensor([-1.0, 0.0, 0.3, 254.0])  # a step is 1, zero lies at 1
    assert onnx_file.affine_uint8(x).tolist() == [-1.0, 0.0, 0.0, 254.0]
    assert onnx_file.affine_uint8(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


# -- the command line ------------------------------------------------------------------------------------------------
def test_export_by_name_and_its_errors(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = finished("digits", runs)
    assert command(monkeypatch, "export", "digits", "--to", "torch", "--out", str(tmp_path / "a"), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run_dir, unfinished)
    shutil.rmtree(unfinished / "final")
    for words, said in (
        (["nothing", "--to", "torch"], "no run 'nothing'"),
        ([str(tmp_path / "a"), "--to", "torch"], "no run.json"),
        ([str(unfinished), "--to", "torch"], "has not finished"),
        ([str(run_dir), "--to", "tflite"], "hf, torch, onnx, gguf, gguf-ready-safetensors"),
        ([str(run_dir), "--to", "hf"], "MLP"),
        ([str(run_dir), "--to", "onnx", "--quantize", "int4"], "takes int8 or int8-vnni"),
        ([str(run_dir), "--to", "onnx", "--sparse"], "cannot store masks"),
    ):
        assert command(monkeypatch, "export", *words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.strip().splitlines()) == 1 and said in error, error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "unfinished"]


def test_the_best_weights_are_exported_by_their_name(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are in a file of their own, which is there before the run has finished."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished("digits", runs), run_dir)
    assert command(monkeypatch, "export", str(run_dir), "--to", "torch", "--best") == 2
    assert "checkpoint.best" in capsys.readouterr().err
    (run_dir / "final").rename(run_dir / "best")
    assert command(monkeypatch, "export", str(run_dir), "--to", "torch", "--best") == 0
    assert [p.name for p in (run_dir / "export").iterdir()] == ["torch-best"]


def test_weights_of_another_model_are_refused(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished("digits", runs), other)
    shutil.copytree(finished("cnn", runs) / "final", other / "final", dirs_exist_ok=True)
    with pytest.raises(CannotExport, match="does not fit the model of the recipe"):
        open_run(other)


@pytest.mark.parametrize("harm", [lambda data: data[:-9], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_damaged_weights_are_refused(runs: Path, tmp_path: Path, harm: Any) -> None:
    shutil.copytree(finished("digits", runs), tmp_path / "run")
    final = tmp_path / "run" / "final" / "model.safetensors"
    final.write_bytes(harm(final.read_bytes()))
    with pytest.raises(CannotExport, match=r"are damaged: .*Train the same recipe into this folder again"):
        open_run(tmp_path / "run")


def test_adapters_are_merged(runs: Path, tmp_path: Path) -> None:
    from shoestring.recipes import recipe_from
    from shoestring.trainer import fit, plan

    base = export(open_run(finished("llama", runs)), "hf", out=tmp_path / "base")
    values = {
        "model": {"task": "causal-lm", "name": base.path, "adapter": {"rank": 2}},
        "data": LANGUAGE, "budget": {"steps": 5}, "optimizer": {"lr": 1e-2}, "strategy": {"name": "single"},
    }  # fmt: skip
    fit(plan(recipe_from(values, "adapted")), run_dir=tmp_path / "run")
    trained = open_run(tmp_path / "run")
    apart = eager(trained.task.module.model.eval())(sample(trained))  # before base and adapter become one
    assert type(trained.model).__name__ == "LlamaForCausalLM"
    before = eager(open_run(finished("llama", runs)).model)(sample(trained))
    made = export(trained, "hf", out=tmp_path / "merged")
    assert made.error == 0 and "adapter_config.json" not in made.files
    after = eager(hf.load(tmp_path / "merged", "causal-lm"))(sample(trained))
    assert relative_error(after, before, {}) > 1e-3
    assert relative_error(after, apart, {}) < 1e-5


def test_formats_are_the_documented_ones() -> None:
    assert all(to.partition("-")[0] in str(write.__doc__) for to in write.FORMATS)
