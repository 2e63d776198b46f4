"""int8 files compute the same on CPUs with and without VNNI; shown on any machine, by emulation."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from finished import finished
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from weak_cpu import QEMU, on_haswell, saturated, without_vnni

from shoestring.callbacks.compression.fake_quantization import PRODUCT_BITS, highest
from shoestring.trainer.export import encodings, onnx_file, runtimes
from shoestring.trainer.export.measure_target import open_target
from shoestring.trainer.export.runtimes import EXACT, Batch, relative_error, sample
from shoestring.trainer.export.runtimes import onnxruntime as opened
from shoestring.trainer.export.trained import CannotExport, Trained, open_run
from shoestring.trainer.export.write import Exported, export

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = ("digits", "llama", "bert")
EMULATED = MODELS[:2]  # ONNX's own evaluator cannot gather BERT's token types
# floats are summed in another order on another CPU, so that now and then a code falls to the next level
RIGHT, WRONG = 3e-3, 3e-2
SATURATING = ("digits", "bert")  # a Llama of random weights has few sums that do
FORMS = ("int8", "int8-vnni")


@cache
def exported(model: str, form: str, home: Path) -> tuple[Trained, Exported]:
    trained = open_run(finished(model, home))
    return trained, export(trained, "onnx", out=home / f"{model}-{form}", quantize=form)


def inputs_of(path: Path, batch: Batch) -> dict[str, np.ndarray]:
    batch = onnx_file.model_inputs(batch)
    return {each.name: batch[each.name].numpy() for each in onnx.load(str(path)).graph.input}


def distance(model: str, form: str, home: Path, run) -> float:
    """Of what `run` makes of the file from what ONNX Runtime makes of it here, as we open it: relative."""
    trained, made = exported(model, form, home)
    path, batch = Path(made.path) / onnx_file.NAME, sample(trained)
    return relative_error(torch.from_numpy(run(path, inputs_of(path, batch))), opened(path)(batch), batch)


@pytest.mark.parametrize("model", EMULATED)
def test_a_portable_file_is_right_without_vnni(model: str, runs: Path) -> None:
    assert distance(model, "int8", runs, without_vnni) < RIGHT


def test_a_file_for_vnni_is_wrong_without_it(runs: Path) -> None:
    """All 8 bits, as every int8 file had them once."""
    assert distance("digits", "int8-vnni", runs, without_vnni) > WRONG


@pytest.mark.skipif(QEMU is None, reason="needs QEMU's qemu-x86_64: make test-cpus installs it")
@pytest.mark.parametrize("model", MODELS)
def test_onnx_runtime_itself_on_a_cpu_without_vnni(model: str, runs: Path, tmp_path: Path) -> None:
    weak = lambda p, x: on_haswell(p, x, tmp_path)  # noqa: E731
    exact = lambda p, x: on_haswell(p, x, tmp_path, f"{EXACT}=1")  # noqa: E731
    wrong = distance(model, "int8-vnni", runs, weak)
    assert distance(model, "int8", runs, weak) < RIGHT and (wrong > WRONG or model not in SATURATING)
    assert distance(model, "int8-vnni", runs, exact) < RIGHT, "as `open_session` opens it"
    if model == "digits":
        assert distance(model, "int8-vnni", runs, without_vnni) == pytest.approx(wrong, rel=0.05), "emulated truly"


@pytest.mark.parametrize("model", MODELS)
def test_files_say_what_they_are_for(model: str, runs: Path) -> None:
    for form, cpu, top in (("int8", "any", 63), ("int8-vnni", "vnni", 127)):
        made = exported(model, form, runs)[1]
        model_proto = onnx.load(str(Path(made.path) / onnx_file.NAME))
        assert {each.key: each.value for each in model_proto.metadata_props}[onnx_file.CPU] == cpu
        assert any("VNNI" in note for note in made.notes) == (cpu == "vnni")
        constants = {each.name: onnx.numpy_helper.to_array(each) for each in model_proto.graph.initializer}
        weights = [constants[node.input[1]] for node in model_proto.graph.node if node.op_type == "MatMulInteger"]
        assert weights and all(np.abs(w.astype(int)).max() == top for w in weights)
    assert exported(model, "int8", runs)[1].error < 2e-2


def test_eight_bits_round_half_as_coarsely(runs: Path) -> None:
    """What the portable form costs: both against the model before, over the sample."""
    portable, fine = (exported("digits", form, runs)[1].from_original for form in FORMS)
    assert fine < portable < 4 * fine


def test_a_file_for_vnni_is_opened_as_one_that_any_cpu_computes(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key: str, value: str) -> None:
            seen[-1][key] = value
            super().add_session_config_entry(key, value)

        def __init__(self) -> None:
            seen.append({})
            super().__init__()

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    for form, vnni in product(FORMS, (True, False)):
        trained, made = exported("digits", form, runs)
        monkeypatch.setattr(runtimes, "multiplies_bytes", lambda vnni=vnni: vnni)
        seen.clear()
        open_target(made.path).logits_function("onnxruntime")(sample(trained))
        assert seen[-1] == ({EXACT: "1"} if form == "int8-vnni" and not vnni else {})


def test_codes_that_would_overflow_are_refused(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = open_run(finished("digits", runs))
    whole = encodings.quantize_product
    monkeypatch.setattr(encodings, "quantize_product", lambda w, axis, bits, grid=False: whole(w, axis, 8, grid))
    with pytest.raises(CannotExport, match=r"has a code of 127, above 63 of 7 bits"):
        export(trained, "onnx", out=tmp_path / "out", quantize="int8")
    assert not list(tmp_path.iterdir())


# -- the arithmetic ----------------------------------------------------------------------------------------------------
TOP = highest(PRODUCT_BITS["any"])


@given(st.data(), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
def test_seven_bits_never_saturate(data: st.DataObject, k: int, m: int, n: int) -> None:
    a = data.draw(arrays(np.uint8, (m, k)))
    b = data.draw(arrays(np.int8, (k, n), elements=st.integers(-TOP, TOP)))
    assert np.array_equal(saturated(a, b), a.astype(int) @ b.astype(int))


def test_eight_bits_do() -> None:
    a, b = np.full((1, 4), 255, np.uint8), np.full((4, 1), 127, np.int8)
    assert saturated(a, b) == 2 * 32767 < 4 * 255 * 127
    assert 2 * 255 * TOP <= 32767


@given(st.integers(2, 8), st.integers(0, 2**32 - 1), st.integers(0, 1))
def test_weights_on_a_grid_keep_it(bits: int, seed: int, axis: int) -> None:
    """Whatever the step of a row: training has chosen it."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.rand(5, 1, generator=draw) + 0.01
    weight = torch.randint(-highest(bits), highest(bits) + 1, (5, 7), generator=draw) * steps
    weight = weight if axis == 0 else weight.T
    codes, scale = encodings.quantize_product(weight, axis, 8, on_grid=True)
    assert torch.allclose(encodings.dequantize_int8(codes, scale), weight, rtol=1e-6, atol=0)
    assert codes.abs().max() <= highest(bits) and scale.shape == ((5, 1) if axis == 0 else (1, 5))
