"""Learned step sizes: their rule by hand, the grid they leave, and the same steps under every strategy."""

import json
import math
import traceback
import warnings
from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from processes import succeed
from ranks import ACCUMULATE, CHECKPOINT, Group, counted
from torch import nn

from shoestring.callbacks import QuantizationAware, StructuredPruning, Unfit
from shoestring.callbacks.compression.fake_quantization import OffGrid, codes, first_steps, quantized, scales, values
from shoestring.callbacks.compression.learned_steps import LearnedSteps
from shoestring.callbacks.contract import BadSetting
from shoestring.trainer.export.quantize import CannotQuantize, bake, quantize

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
BITS = 3


# -- the rule ----------------------------------------------------------------------------------------------------------
def learner(*steps):
    learned = LearnedSteps(BITS)
    learned.begin("w", torch.ones(len(steps), 2))
    with torch.no_grad():
        learned.steps["w"].copy_(torch.tensor(steps).view(-1, 1, 1))
    return learned


def test_two_steps_of_descent_by_hand():
    """Gradients s dL/ds of (3, 4), then (3, -4): the mean square is 12.5 both times, and momentum is half old, half new
    up to 0.1 : 0.09."""
    learned = learner(1.0, 2.0)
    learned.steps["w"].grad = torch.tensor([3.0, 2.0]).view(2, 1, 1)
    learned.descend(0.1)
    one = [math.exp(-0.1 * 3 / 12.5**0.5), 2 * math.exp(-0.1 * 4 / 12.5**0.5)]
    assert learned.steps["w"].flatten().tolist() == pytest.approx(one)
    assert learned.steps["w"].grad is None
    learned.steps["w"].grad = torch.tensor([3 / one[0], -4 / one[1]]).view(2, 1, 1)
    learned.descend(0.1)
    mean = [3.0, (0.09 * 4 - 0.1 * 4) / 0.19]
    two = [s * math.exp(-0.1 * m / 12.5**0.5) for s, m in zip(one, mean, strict=True)]
    assert learned.steps["w"].flatten().tolist() == pytest.approx(two)


def test_steps_without_a_gradient_stay_and_none_becomes_negative():
    learned = learner(1.0, 1.0)
    for _ in range(3):
        learned.steps["w"].grad = torch.tensor([1e6, 0.0]).view(2, 1, 1)
        learned.descend(1e3)
    first, second = learned.steps["w"].flatten().tolist()
    assert 0 < first < 1e-20 and second == 1.0


def test_slices_are_put_on_the_grid_of_their_groups():
    """[out 2, groups 2, of 3]: a slice from the middle of the first group to the middle of the last."""
    learned = LearnedSteps(BITS, group_size=3)
    weight = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    learned.begin("w", weight)
    whole = values(codes(weight, learned.steps["w"].detach(), BITS), learned.steps["w"].detach())
    part = weight.flatten()[1:11].clone()
    learned.put_on_grid("w", part, 1, 12)
    assert torch.equal(part, whole.flatten()[1:11])
    learned.put_on_grid("w", torch.empty(0), 12, 12)


def test_cutting_channels_cuts_their_steps():
    learned = LearnedSteps(BITS)
    learned.begin("w", torch.tensor([[1.0, 1], [2, 2], [3, 3]]))
    learned.steps["w"].grad = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    learned.descend(0.1)
    before = learned.state_dict()["layers"]["w"]
    cut_model = torch.zeros(2, 2)
    assert learned.quantize("w", cut_model) is cut_model, "tried out before the steps are cut"
    assert learned.cut("w", [(0, torch.tensor([True, False, True])), (1, torch.tensor([True, False]))])
    after = learned.state_dict()["layers"]["w"]
    for kept in ("steps", "mean"):
        assert after[kept] == before[kept][::2]
    assert after["square"] == before["square"] and learned.steps["w"].requires_grad
    grouped = LearnedSteps(BITS, group_size=2)
    grouped.begin("w", torch.ones(3, 4))
    assert grouped.cut("w", [(0, torch.tensor([True, True, False]))])
    assert not grouped.cut("w", [(1, torch.tensor([True, True, False, False]))])


# -- finding the grid again --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_grid_of_baked_weights_is_found_again(bits, group_size):
    """Whatever the steps were: absmax alone would take the largest weight for the highest level."""
    draw = torch.Generator().manual_seed(bits)
    weight = torch.randn(16, 64, generator=draw)
    weight[torch.rand(16, 64, generator=draw) < 0.3] = 0
    weight[5] = 0
    steps = first_steps(weight, bits, group_size) * (0.2 + 3 * torch.rand(16, 1, 1, generator=draw))
    baked = values(codes(weight, steps, bits), steps)
    again = quantized(baked, bits, group_size, "lsq")
    assert torch.allclose(again, baked, rtol=1e-6, atol=0)
    assert (again[baked == 0] == 0).all()
    if bits == 8:
        assert not torch.allclose(quantized(baked, bits, group_size), baked, rtol=1e-6, atol=0)
    assert torch.equal(codes(baked, scales(baked, bits, group_size, "lsq"), bits).abs().amax(-1) > 0, baked.any(-1))


def test_codes_are_found_by_hand():
    weight = torch.tensor([[0.4, -0.8, 1.2], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    steps = scales(weight, 3, None, "lsq")
    assert steps.flatten().tolist() == pytest.approx([0.4, 0.5, 1.0])
    assert codes(weight, steps, 3).tolist() == [[1, -2, 3], [1, 0, 0], [0, 0, 0]]
    with pytest.raises(OffGrid, match="1 of 2 groups of weights lie on no grid of 3 levels"):
        scales(weight[:2], 2, None, "lsq")


# -- the technique -----------------------------------------------------------------------------------------------------
class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch, batch_idx):
        return ((self.net(batch[0]) - batch[1]) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Shown(pl.Callback):
    """What the layers compute just before the end."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == trainer.max_steps:
            with torch.no_grad():
                self.x, self.outputs = batch[0], pl_module.net(batch[0])
            self.masters = [pl_module.net[i].weight.detach().clone() for i in (0, 2)]


def samples():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=draw)
    return torch.utils.data.TensorDataset(x, x @ torch.randn(8, 4, generator=draw) / 8**0.5)


def train(technique, steps=40, callbacks=(), module=None, **options):
    module = module or Regression()
    pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[technique, *callbacks], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    ).fit(module, torch.utils.data.DataLoader(samples(), batch_size=16))  # fmt: skip
    return module


@pytest.mark.parametrize(("bits", "activations", "group"), [(2, None, None), (4, None, 4), (4, 8, None), (8, 8, None)])
def test_export_computes_what_was_trained(bits, activations, group):
    """Of the weights to the last bits of a float; with 8-bit activations within the rounding of torchao's product."""
    shown = Shown()
    technique = QuantizationAware(weight_bits=bits, activation_bits=activations, group_size=group, scale="lsq")
    net = train(technique, callbacks=[shown]).net
    assert all(not torch.equal(net[i].weight, m) for i, m in zip((0, 2), shown.masters, strict=True)), "now on the grid"
    served = quantize(net, bits, activations, group, scale="lsq", compiled=False)
    found = served(shown.x)
    assert (found - shown.outputs).norm() <= (1e-5 if activations is None else 5e-3) * shown.outputs.norm()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    bake(net, bits, group, scale="lsq")
    assert all(torch.allclose(p, before[name], rtol=1e-6, atol=0) for name, p in net.named_parameters())


def test_onnx_runtime_computes_what_was_trained(tmp_path):
    from shoestring.trainer.export.onnx_quantize import quantize_onnx

    shown = Shown()
    net = train(QuantizationAware(weight_bits=8, activation_bits=8, scale="lsq"), callbacks=[shown]).net
    (found,) = quantize_onnx(net, (shown.x,), tmp_path / "net.onnx", scale="lsq")(shown.x)
    assert (found - shown.outputs).norm() < 0.02 * shown.outputs.norm()


def test_steps_are_learned_and_lower_the_loss():
    """Two bits, each with its own steps: those that are trained, and the same start left as it is (scale_lr=0)."""
    x, y = samples().tensors

    def loss(scale_lr):
        technique = QuantizationAware(weight_bits=2, scale="lsq", scale_lr=scale_lr)
        net = train(technique, steps=200).net
        with torch.no_grad():
            return ((net(x) - y) ** 2).mean().item(), technique.state_dict()["layers"]["net.0.weight"]["steps"]

    (learned, after), (fixed, start) = loss(1.0), loss(0.0)
    torch.manual_seed(0)
    assert start == first_steps(nn.Linear(8, 32).weight, 2).flatten().tolist()
    assert all(s > 0 for s in after) and after != start
    assert learned < fixed


def test_they_start_when_the_grid_does():
    technique = QuantizationAware(weight_bits=2, scale="lsq", start="50%")
    early = QuantizationAware(weight_bits=2, scale="lsq", start="100%")
    train(technique, steps=8), train(early, steps=8)
    assert technique.state_dict()["count"] == 4 and early.state_dict() == {}


def test_errors_name_what_is_wrong():
    with pytest.raises(BadSetting, match="scale_lr=-1"):
        QuantizationAware(scale_lr=-1).check()
    with pytest.raises(BadSetting, match=r"scale='lsq' is not allowed; use absmax \| mse with adapters='merged'"):
        QuantizationAware(scale="lsq", adapters="merged").check()
    module = Regression()
    module.net[0].weight.requires_grad_(False)
    with pytest.raises(Unfit, match=r"net\.0\.weight are frozen"):
        train(QuantizationAware(scale="lsq"), module=module)
    with pytest.raises(CannotQuantize, match=r"0\.weight: 32 of 32 groups of weights lie on no grid of 15 levels"):
        quantize(Regression().net, 4, None, scale="lsq")


# -- ranks -------------------------------------------------------------------------------------------------------------
STRATEGIES = {"single": 1, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2}
CASES = {  # without activations, of which one that is rounded the other way shows in the sixth digit
    "lsq": lambda: [QuantizationAware(weight_bits=4, scale="lsq", start="2 steps")],
    "lsq-cut": lambda: [
        StructuredPruning(ratio=0.5, at="4 steps", round_to=2), QuantizationAware(weight_bits=4, scale="lsq"),
    ],
}  # fmt: skip


class Steps(pl.Callback):
    """The technique's state at the end of the run."""

    def on_train_end(self, trainer, pl_module):
        self.found = next(c for c in trainer.callbacks if isinstance(c, QuantizationAware)).state_dict()


def rank(strategy, folder):
    warnings.simplefilter("ignore")
    group, found = Group(strategy, folder), {}
    for case, techniques in CASES.items():
        steps = Steps()
        try:
            found[case] = group.resume(case, techniques)
            found[case]["still"] = group.train(f"{case}-still", *techniques(), dropout=0.0, callbacks=(steps,))
            found[case]["steps"] = steps.found
        except Exception:
            found[case] = {"error": traceback.format_exc()}
    if strategy == "ddp":
        found["collectives"] = {"per_step": collectives(group)}
    (folder / f"rank-{group.rank}.json").write_text(json.dumps(found))


def collectives(group):
    """What Python asks of torch.distributed per step in the middle of a run."""
    counts: Counter = Counter()

    class Middle(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            counts["on"] = int(4 <= trainer.global_step < 8)

    with counted(counts):
        group.train("collectives", *CASES["lsq"](), callbacks=(Middle(),), limit_val_batches=0)
    return {name: n / 4 for name, n in counts.items() if name != "on"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    known = {}

    def train_under(strategy):
        if strategy not in known:
            folder, world = tmp_path_factory.mktemp(strategy), STRATEGIES[strategy]
            succeed(rank, strategy, folder, world=world, folder=folder, timeout=400)
            known[strategy] = [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(world)]
        for report in known[strategy]:
            assert all("error" not in case for case in report.values()), report
        return known[strategy]

    return train_under


def losses(reports, case):
    each = [report[case]["still"]["losses"] for report in reports]
    micro = [sum(of_ranks) / len(each) for of_ranks in zip(*each, strict=True)]
    return [sum(micro[i : i + ACCUMULATE]) / ACCUMULATE for i in range(0, len(micro), ACCUMULATE)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumes_bit_for_bit_and_alike_on_all_ranks(strategy, case, ran):
    reports = [report[case] for report in ran(strategy)]
    for report in reports:
        whole, resumed = report["whole"], report["resumed"]
        assert resumed["resumed_from"] == CHECKPOINT
        assert resumed["losses"] == whole["losses"][CHECKPOINT * ACCUMULATE :]
        for kept in ("final", "masters", "validations"):
            assert resumed[kept] == (whole[kept] if kept != "validations" else [v for v in whole[kept] if v[0] > 5])
    assert all(report["steps"] == reports[0]["steps"] for report in reports)
    assert len({report["whole"]["masters"] for report in reports}) == 1


def test_one_sum_a_step_is_all_that_is_added(ran):
    """Besides the asynchronous one of signals, budget and counters."""
    for report in ran("ddp"):
        assert report["collectives"]["per_step"] == {"all_reduce": 1.0, "all_reduce blocking": 1.0}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "single"])
def test_steps_and_losses_are_those_of_one_device(strategy, case, ran):
    alone, together = ran("single"), ran(strategy)
    drift = [abs(a - b) for a, b in zip(losses(alone, case), losses(together, case), strict=True)]
    assert max(drift) < 2e-5
    expected = alone[0][case]["steps"]
    assert expected["count"] == (10 if case == "lsq" else 12) and len(expected["layers"]) == 5
    for name, layer in expected["layers"].items():
        assert together[0][case]["steps"]["layers"][name]["steps"] == pytest.approx(layer["steps"], rel=1e-5), name
    rows = len(expected["layers"]["blocks.0.wide.weight"]["steps"])
    assert rows == 23 if case == "lsq" else rows < 23
