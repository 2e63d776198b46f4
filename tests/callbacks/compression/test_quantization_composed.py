"""Quantization-aware training together with pruning, factors, a teacher and 16 bits, on two ranks under ZeRO-2."""

import json
import logging
import traceback
import warnings
from itertools import permutations

import pytest
import pytorch_lightning as pl
import torch
from processes import succeed
from ranks import Group
from toy import DEVICE, held_out, loader, toy

from shoestring.callbacks import Distillation, GradualPruning, LowRank, QuantizationAware, StructuredPruning
from shoestring.callbacks.catalog.compose import compose
from shoestring.callbacks.catalog.registry import make
from shoestring.callbacks.compression.fake_quantization import OffGrid, scales
from shoestring.callbacks.parameters.layers import quantizable
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.export.quantize import quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
STEPS, BITS, LEVELS = 6, 4, 15
OTHERS = {
    "gradual_pruning": lambda: GradualPruning(sparsity=0.6, start="0%", end="50%", every=1),
    "structured_pruning": lambda: StructuredPruning(ratio=0.5, at="3 steps", round_to=2),
    "low_rank": lambda: LowRank(energy=0.7),
    "distillation": lambda: Distillation(teacher="initial", weight=0.5, teacher_dtype="float32"),
    "mixed_precision": lambda: make("mixed_precision"),
}
RULES = ("absmax", "lsq")


class Look(pl.Callback):
    """What layers compute with, and what the teacher is."""

    def __init__(self):
        self.levels, self.types, self.teacher = {}, set(), None

    def on_train_start(self, trainer, pl_module):
        layers = [(name, used.module) for name, used_by in quantizable(pl_module).items() for used in used_by]
        self.hooks = [layer.register_forward_hook(self.look(name), prepend=True) for name, layer in layers]

    def look(self, name):
        def look(layer, inputs, output):
            self.levels[name] = max(len(row.unique()) for row in layer.weight.detach())
            self.types.add(str(output.dtype))

        return look

    def on_train_end(self, trainer, pl_module):
        for hook in self.hooks:
            hook.remove()
        for callback in trainer.callbacks:
            if isinstance(callback, Distillation):
                self.teacher = {n: p.double().sum().item() for n, p in callback._teacher.module.named_parameters()}


def rank(folder):
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    group, results = Group("zero2", folder), {}
    for other, technique in OTHERS.items():
        for rule in RULES:
            case, look = f"{other}-{rule}", Look()
            try:
                aware = QuantizationAware(weight_bits=BITS, scale=rule)
                report = group.train(case, technique(), aware, steps=STEPS, callbacks=(look,))
                results[case] = {**report, "levels": look.levels, "types": sorted(look.types), "teacher": look.teacher}
            except Exception:
                results[case] = {"error": traceback.format_exc()}
            (folder / f"rank-{group.rank}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """case -> (what the two ranks report, the final weights)."""
    folder = tmp_path_factory.mktemp("composed")
    succeed(rank, folder, world=2, folder=folder, timeout=400)
    by_rank = [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(2)]

    def case(name):
        reports = [report[name] for report in by_rank]
        assert all("error" not in report for report in reports), reports[0].get("error")
        return reports, load_weights(folder / "runs" / name / "final")

    return case


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("other", OTHERS)
def test_trains_on_the_grid_alike_on_both_ranks(other, rule, ran):
    reports, final = ran(f"{other}-{rule}")
    for report in reports:
        assert report["steps"] == STEPS
        assert 5 <= len(report["levels"]) <= 10 and all(1 < n <= LEVELS for n in report["levels"].values())
    assert reports[0]["masters"] == reports[1]["masters"]
    assert all(tensor.isfinite().all() for tensor in final.values())
    for name in reports[0]["levels"]:
        if rule == "lsq":
            scales(final[name], BITS, None, "lsq")  # raises unless the weights are on a grid
        else:
            with pytest.raises(OffGrid):
                scales(final[name], BITS, None, "lsq")


@pytest.mark.parametrize("rule", RULES)
def test_pruned_weights_are_zero_in_the_exported_model(rule, ran):
    _, final = ran(f"gradual_pruning-{rule}")
    model = toy()
    model.load_state_dict(final)
    served = dict(quantize(model, BITS, None, scale=rule).named_parameters())
    for name in quantizable(model):
        zeros = final[name] == 0
        assert zeros.float().mean() > 0.3 and (served[name].dequantize()[zeros] == 0).all()
    total = sum((final[name] == 0).sum() for name in quantizable(model))
    assert total >= 0.6 * sum(final[name].numel() for name in quantizable(model)) - 5


@pytest.mark.parametrize("rule", RULES)
def test_cut_layers_stay_cut_and_factors_stay_factors(rule, ran):
    _, cut = ran(f"structured_pruning-{rule}")
    assert cut["blocks.0.wide.weight"].shape[0] == cut["blocks.0.narrow.weight"].shape[1] < 23
    reports, factors = ran(f"low_rank-{rule}")
    assert "head.weight" not in factors
    assert {"head.first.weight", "head.second.weight"} <= reports[0]["levels"].keys()


@pytest.mark.parametrize("rule", RULES)
def test_the_teacher_is_not_quantized(rule, ran):
    reports, _ = ran(f"distillation-{rule}")
    expected = {name: p.double().sum().item() for name, p in toy().named_parameters()}
    assert reports[0]["teacher"] == reports[1]["teacher"] == expected


@pytest.mark.parametrize("rule", RULES)
def test_sixteen_bits_come_after_the_grid(rule, ran):
    reports, final = ran(f"mixed_precision-{rule}")
    assert reports[0]["types"] == ["torch.bfloat16"] and reports[0]["copies"] == "torch.bfloat16"
    assert all(final[name].dtype == torch.float32 for name in reports[0]["levels"])


# -- the initial teacher -----------------------------------------------------------------------------------------------
class Teacher(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        teacher = next(c for c in trainer.callbacks if isinstance(c, Distillation))._teacher.module
        self.shapes = {name: tuple(p.shape) for name, p in teacher.named_parameters()}
        self.weights = {name: p.detach().clone() for name, p in teacher.named_parameters()}


def taught(techniques):
    look = Teacher()
    pl.Trainer(
        accelerator=DEVICE, max_steps=STEPS, max_epochs=-1, callbacks=[*techniques, look], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(toy(), loader(), held_out())  # fmt: skip
    return look


def smaller(*names):
    aware = QuantizationAware(weight_bits=BITS)
    made = {"low_rank": LowRank(energy=0.7), "structured_pruning": StructuredPruning(at="3 steps", round_to=2)}
    return [Distillation(teacher_dtype="float32"), *({**made, "quantization_aware": aware}[name] for name in names)]


@pytest.mark.parametrize("names", [("low_rank", "quantization_aware"), ("structured_pruning", "quantization_aware")])
def test_the_initial_teacher_has_the_original_layers(names):
    orders = set()
    for given in permutations(smaller(*names)):
        composition = compose(given, {"cpu", "single", "adamw"})
        orders.add(tuple(t.card.name for t in composition.techniques))
        for name in names:
            assert any(reason.startswith(f"distillation before {name}") for reason in composition.reasons)
    assert orders == {("distillation", *names)}
    look = taught(compose(smaller(*names), {"cpu", "single", "adamw"}).techniques)
    original = dict(toy().named_parameters())
    assert look.shapes == {name: tuple(p.shape) for name, p in original.items()}
    assert all(torch.equal(weight, original[name]) for name, weight in look.weights.items())


def test_a_teacher_copied_after_the_cut_into_factors_has_factors():
    """What the rule prevents, in a trainer that lets callbacks act in any order."""
    teacher, low_rank = smaller("low_rank")
    assert "head.first.weight" in taught([low_rank, teacher]).shapes
