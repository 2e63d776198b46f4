"""Learned step sizes: their rule by hand, and the grid they leave to be exported."""

import math

import pytest
import pytorch_lightning as pl
import torch
from int8_file import int8_file
from torch import nn

from shoestring.callbacks import IncompatibleTechniques, QuantizationAware
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
def test_the_grid_of_baked_weights_is_recovered(bits, group_size):
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


def test_codes_by_hand():
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
    computed = served(shown.x)
    assert (computed - shown.outputs).norm() <= (1e-5 if activations is None else 5e-3) * shown.outputs.norm()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    bake(net, bits, group, scale="lsq")
    assert all(torch.allclose(p, before[name], rtol=1e-6, atol=0) for name, p in net.named_parameters())


def test_onnx_runtime_computes_what_was_trained(tmp_path):
    shown = Shown()
    net = train(QuantizationAware(weight_bits=8, activation_bits=8, scale="lsq"), callbacks=[shown]).net
    computed = int8_file(net, {"input": shown.x}, tmp_path / "net.onnx", scale="lsq")({"input": shown.x})
    assert (computed - shown.outputs).norm() < 0.02 * shown.outputs.norm()


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
    with pytest.raises(IncompatibleTechniques, match=r"net\.0\.weight are frozen"):
        train(QuantizationAware(scale="lsq"), module=module)
    with pytest.raises(CannotQuantize, match=r"0\.weight: 32 of 32 groups of weights lie on no grid of 15 levels"):
        quantize(Regression().net, 4, None, scale="lsq")
