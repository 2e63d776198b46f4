"""Low-bit training: what layers see, what is trained, and what it is worth on top of LoRA and pruning."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shoestring.callbacks import GradualPruning, IncompatibleTechniques, QuantizationAware
from shoestring.callbacks.compression.fake_quantization import BadGroups, fake_quantize_tokens, quantized
from shoestring.callbacks.contract import BadSetting
from shoestring.callbacks.forward.forward_weights import NeverUsed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]


class Regression(pl.LightningModule):
    """Learn y from x with any net."""

    def __init__(self, net, lr=1e-2):
        super().__init__()
        self.net, self.lr = net, lr
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = ((self.net(x) - y) ** 2).mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def data(inputs=8, outputs=4):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, inputs, generator=draw)
    return TensorDataset(x, x @ torch.randn(inputs, outputs, generator=draw) / inputs**0.5)


def train(net, *techniques, steps=20, samples=None, callbacks=(), lr=1e-2):
    module = net if isinstance(net, pl.LightningModule) else Regression(net, lr)
    pl.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[*techniques, *callbacks], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader(samples or data(), batch_size=16))  # fmt: skip
    return module


def mlp(width=16, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))


class RecordOutputs(pl.Callback):
    """What every batch's first layer gave, and what the parameter was."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        pl_module.net[0].register_forward_hook(
            lambda layer, inputs, out: self.seen.append((inputs[0].detach(), out.detach()))
        )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        layer = pl_module.net[0]
        self.expected = (layer._parameters["weight"].detach().clone(), layer.bias.detach().clone(), batch[0])


def test_layers_compute_with_quantized_weights_and_tokens():
    class Check(RecordOutputs):
        checked = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            weight, bias, x = self.expected
            expected = nn.functional.linear(fake_quantize_tokens(x), quantized(weight, 4), bias)
            assert torch.equal(self.seen[-1][1], expected)
            assert not torch.equal(weight, quantized(weight, 4)), "the parameter itself is not on the grid"
            Check.checked += 1

    train(mlp(), QuantizationAware(weight_bits=4, activation_bits=8), callbacks=[Check()])
    assert Check.checked == 20


def test_it_starts_at_its_start():
    plain = train(mlp(), steps=10).losses
    late = train(mlp(), QuantizationAware(weight_bits=2, start="5 steps"), steps=10).losses
    assert late[:5] == plain[:5] and late[5] != plain[5]
    at_once = train(mlp(), QuantizationAware(weight_bits=2), steps=10).losses
    assert at_once[0] != plain[0]


def test_activations_alone():
    plain, quiet = mlp(), mlp()
    train(plain, steps=3)
    train(quiet, QuantizationAware(weight_bits=16, activation_bits=8), steps=3)
    assert not torch.equal(plain[0].weight, quiet[0].weight)


@pytest.mark.parametrize("seed", range(3))
def test_training_for_two_bits_beats_rounding_to_two_bits(seed):
    """The loss of the quantized net after as many steps with and without the technique."""
    x, y = data().tensors

    def quantized_loss(net):
        shown = mlp(64)
        with torch.no_grad():
            for i in (0, 2):
                shown[i].weight.copy_(quantized(net[i].weight, 2, rule="mse"))
                shown[i].bias.copy_(net[i].bias)
            return ((shown(x) - y) ** 2).mean().item()

    plain, aware = mlp(64, seed), mlp(64, seed)
    train(plain, steps=300, lr=3e-3)
    train(aware, QuantizationAware(weight_bits=2, scale="mse", start="50%"), steps=300, lr=3e-3)
    assert quantized_loss(aware) < 0.5 * quantized_loss(plain)


def test_pruned_zeros_stay_zero_in_what_layers_see():
    class Zeros(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            def look(layer, inputs, out):
                self.parameter, self.shown = layer._parameters["weight"].detach().clone(), layer.weight.detach().clone()

            pl_module.net[0].register_forward_hook(look, prepend=True)

    zeros = Zeros()
    pruning = GradualPruning(sparsity=0.75, start="0%", end="50%", every=2)
    train(mlp(), pruning, QuantizationAware(weight_bits=4), callbacks=[zeros])
    assert (zeros.parameter == 0).float().mean() == 0.75
    assert (zeros.shown[zeros.parameter == 0] == 0).all()
    assert not torch.equal(zeros.shown, zeros.parameter)


def test_errors_name_what_is_wrong():
    for bad, words in (
        ({"weight_bits": 1}, "weight_bits=1 is not allowed; use 2 to 8"),
        ({"activation_bits": 4}, "activation_bits=4"),
        ({"group_size": 0}, "group_size=0"),
        ({"scale": "max"}, "scale='max' is not allowed; use absmax | mse"),
        ({"adapters": "both"}, "adapters='both'"),
        ({"skip": "head"}, "a list of patterns"),
    ):
        with pytest.raises(BadSetting, match=words):
            QuantizationAware(**bad).check()
    with pytest.raises(BadGroups, match=r"net\.0\.weight has 8 inputs a row, which groups of 3"):
        train(mlp(), QuantizationAware(group_size=3))
    with pytest.raises(IncompatibleTechniques, match="finds no linear or convolution layer"):
        train(mlp(), QuantizationAware(skip=["*"]))


def test_a_weight_that_is_read_past_its_layer_is_named():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight)

    with pytest.raises(NeverUsed, match=r"net\.layer\.weight"):
        train(Bypass(), QuantizationAware())
    train(Bypass(), QuantizationAware(weight_bits=16))  # strength 0 looks at nothing


# -- LoRA --------------------------------------------------------------------------------------------------------------
def lora(dropout=0.0):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["0", "2"])
    net = get_peft_model(mlp(), config)
    draw = torch.Generator().manual_seed(1)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.1, generator=draw)
    return net


def held(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("adapters", ["apart", "merged"])
def test_adapters_learn_on_a_quantized_base(adapters):
    net = lora()
    before = held(net)
    module = train(net, QuantizationAware(weight_bits=3, adapters=adapters), steps=150, lr=3e-2)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name), name
    assert sum(module.losses[-10:]) < 0.5 * sum(module.losses[:10])
    assert not any(hasattr(m, "_forward_pre_hooks") and m._forward_pre_hooks for m in net.modules())


def test_merged_is_what_the_merged_and_quantized_model_computes():
    """x Q(W + BA): the same outputs as PEFT's own merge followed by quantization of the one weight."""
    from copy import deepcopy

    class Last(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            merged = deepcopy(pl_module.net)
            for layer in merged.modules():  # the copy took the hooks along
                layer._forward_pre_hooks.clear(), layer._forward_hooks.clear()
            merged = merged.merge_and_unload()
            with torch.no_grad():
                for i in (0, 2):
                    merged[i].weight.copy_(quantized(merged[i].weight, 4))
                self.expected = merged(batch[0])
                self.computed = pl_module.net(batch[0])

    last = Last()
    train(lora(), QuantizationAware(weight_bits=4, adapters="merged"), callbacks=[last], steps=5)
    assert torch.allclose(last.computed, last.expected, atol=1e-5)
    train(lora(), QuantizationAware(weight_bits=4, adapters="apart"), callbacks=[last], steps=5)
    assert not torch.allclose(last.computed, last.expected, atol=1e-3)


def test_the_gradient_of_merged_adapters_is_that_of_the_straight_through_merge():
    net = lora()
    layer = net.base_model.model[0]
    x, pull = torch.randn(3, 8), torch.randn(3, 16)
    grads = {}

    class Take(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            layer.zero_grad()
            (layer(x) * pull).sum().backward()
            grads.update(A=layer.lora_A["default"].weight.grad.clone(), B=layer.lora_B["default"].weight.grad.clone())
            layer.zero_grad()

    a, b = (w["default"].weight.detach().clone().requires_grad_() for w in (layer.lora_A, layer.lora_B))
    train(net, QuantizationAware(weight_bits=4, adapters="merged"), callbacks=[Take()], steps=1)
    effective = 2.0 * b @ a  # alpha / r
    ((x @ effective.T) * pull).sum().backward()  # straight through: d Q(W + BA) = d BA
    assert torch.allclose(grads["A"], a.grad, atol=1e-5) and torch.allclose(grads["B"], b.grad, atol=1e-5)
