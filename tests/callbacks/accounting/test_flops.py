"""FLOPs counted by watching a step, against the same counted by hand."""

import pytest
import pytorch_lightning as pl
import torch
from small import QUIET, train
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from shoestring.callbacks import Accountant, GradientCheckpointing, GradualPruning, SequenceLengthWarmup, TopKAST
from shoestring.callbacks.accounting.flops import FlopCounter
from shoestring.trainer import Budget

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]

B, T, IN, OUT = 3, 5, 7, 11
ONE = 2 * B * IN * OUT  # a product of [B, IN] with [IN, OUT]


def count(step, densities=None):
    with FlopCounter(densities) as counter:
        step()
    return counter.flops.counted, counter.flops.realised


def test_a_linear_layer():
    layer, x = nn.Linear(IN, OUT), torch.randn(B, IN)
    assert count(lambda: layer(x)) == (ONE, ONE)
    assert count(lambda: layer(x).sum().backward()) == (2 * ONE, 2 * ONE)  # forward, gradient of the weight
    x.requires_grad_()
    assert count(lambda: layer(x).sum().backward()) == (3 * ONE, 3 * ONE)  # and of the input


def test_a_frozen_prefix_costs_its_forward_alone():
    prefix, head, x = nn.Linear(IN, IN), nn.Linear(IN, OUT), torch.randn(B, IN)
    hidden = 2 * B * IN * IN
    assert count(lambda: head(prefix(x)).sum().backward())[0] == 2 * hidden + 3 * ONE
    prefix.requires_grad_(False)
    assert count(lambda: head(prefix(x)).sum().backward())[0] == hidden + 2 * ONE


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_on_the_cpu(grouped):
    """scores and their product with v: 2 * 2 B H T T D forward; backward recomputes scores and makes four products."""
    heads, width = 4, 8
    q, k, v = (torch.randn(B, heads, T, width, requires_grad=True) for _ in range(3))
    product = 2 * B * heads * T * T * width
    assert count(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=grouped)) == (2 * product, 2 * product)
    step = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=grouped).sum().backward()  # noqa: E731
    assert count(step) == (7 * product, 7 * product)


def test_a_convolution():
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(B, 2, 6, 6)
    assert count(lambda: layer(x))[0] == 2 * B * 3 * 4 * 4 * 2 * 9


def test_a_recomputed_block_is_realised_but_not_counted():
    block, x = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, IN)), torch.randn(B, IN)
    plain = count(lambda: block(x).sum().backward())
    again = count(lambda: checkpoint(block, x, use_reentrant=False).sum().backward())
    assert plain == (5 * ONE, 5 * ONE)
    # the last product of the block is not needed again; torch stops the recomputation before it
    assert again[0] == 5 * ONE and again[1] in (6 * ONE, 7 * ONE)


def test_products_with_a_masked_weight_count_by_its_density():
    layer, x = nn.Linear(IN, OUT), torch.randn(B, IN, requires_grad=True)
    density = {layer.weight.untyped_storage().data_ptr(): 0.25}
    forward_and_input, weight = 2 * ONE * 0.25, ONE  # the dense gradient is computed
    assert count(lambda: layer(x).sum().backward(), density) == (forward_and_input + weight, 3 * ONE)

    def autocast():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x).sum().backward()

    assert count(autocast, density) == (forward_and_input + weight, 3 * ONE)


def test_a_copy_of_a_masked_weight_has_its_density_for_as_long_as_it_lives():
    weight, mask = torch.randn(OUT, IN, requires_grad=True), torch.ones(OUT, IN)
    x = torch.randn(B, IN)
    density = {weight.untyped_storage().data_ptr(): 0.25}

    def soft():
        seen = ((weight * mask) / 2).round().clamp(-9, 9) * 2  # masked, and on a grid
        return nn.functional.linear(x, seen)

    assert count(soft, density) == (0.25 * ONE, ONE)

    with FlopCounter(density) as counter, torch.no_grad():
        seen = weight * mask
        assert counter._density([seen]) == 0.25
        place = seen.untyped_storage().data_ptr()
        del seen
    assert counter._copies[place][1].expired(), "whoever gets the memory next is no copy"


# -- in runs ---------------------------------------------------------------------------------------------------------
class Words(pl.LightningModule):
    """Embedding [32, 8] and a linear layer [8, 16]: 2 * 8 * 16 FLOPs a token for each of three products."""

    TOKEN = 2 * 8 * 16

    def __init__(self, blocks=0):
        super().__init__()
        self.embed, self.first, self.last = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.first.requires_grad_(False)
        block = lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh())  # noqa: E731
        self.blocks = nn.ModuleList(block() for _ in range(blocks))

    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"] if isinstance(batch, dict) else batch[0]
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.last(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Lines(TensorDataset):
    def __getitem__(self, index):
        return {"input_ids": self.tensors[0][index]}


def lines(samples=16, length=16, batch=4):
    return DataLoader(Lines(torch.randint(0, 32, (samples, length))), batch)


def test_the_count_follows_the_sequence_length(tmp_path):
    technique = SequenceLengthWarmup(start=4, until="80%", multiple=2)
    summary = train(tmp_path, Budget(steps=10), module=Words(), data=lines(), techniques=[technique]).summary
    assert 10 * 16 < summary["tokens"] < 10 * 4 * 16
    assert summary["flops_counted"] == summary["flops_realised"] == 3 * Words.TOKEN * summary["tokens"]


def test_the_count_follows_the_batch_size_and_partial_windows():
    """In anybody's trainer: ten samples in batches of 4, 4 and 2; the optimizer steps twice an epoch."""
    accountant = Accountant()
    data = DataLoader(TensorDataset(torch.randint(0, 32, (10, 16))), 4)
    trainer = pl.Trainer(
        max_epochs=2, accumulate_grad_batches=2, callbacks=[accountant], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Words(), data)
    spend = accountant.clock.spend
    assert spend.samples == 20
    assert spend.flops == 3 * Words.TOKEN * 20 * 16
    assert accountant.clock.step == trainer.global_step == 4
    assert accountant.clock.horizon == 4


def test_the_count_follows_freezing_even_if_as_many_stay_trainable(tmp_path):
    class Freeze(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 4:  # another parameter set of the same size: only the embedding's path is cut
                module.embed.requires_grad_(False)
                module.first.weight.requires_grad_(True)

    summary = train(tmp_path, Budget(steps=10), module=Words(), data=lines(), callbacks=[Freeze()]).summary
    tokens = 4 * 16
    assert summary["flops_realised"] == Words.TOKEN * tokens * (4 * 3 + 6 * 2)


def test_recomputation_in_a_run(tmp_path):
    module = Words(blocks=2)
    plain = train(tmp_path / "a", Budget(steps=3), module=Words(blocks=2), data=lines()).summary
    again = train(
        tmp_path / "b", Budget(steps=3), module=module, data=lines(), techniques=[GradientCheckpointing()]
    ).summary
    tokens = 3 * 4 * 16
    assert plain["flops_counted"] == plain["flops_realised"] == again["flops_counted"]
    assert again["flops_realised"] - plain["flops_realised"] == 2 * (2 * 8 * 8) * tokens


def test_masks_in_a_run(tmp_path):
    technique = GradualPruning(sparsity=0.5, start="0%", end="1%", every=1)
    summary = train(tmp_path, Budget(steps=8), module=Words(), data=lines(), techniques=[technique]).summary
    tokens = 4 * 16
    dense, halved = 3 * Words.TOKEN * tokens, 2 * Words.TOKEN * tokens
    # masks are made at the end of the second step, whose cost is not touched by them
    assert technique.densities() == {"last.weight": 0.5}
    assert summary["flops_realised"] == 8 * dense
    assert summary["flops_counted"] == 2 * dense + 6 * halved


def test_soft_masks_in_a_run(tmp_path):
    technique = TopKAST(sparsity=0.5, backward_sparsity=0.5, every=100)
    summary = train(tmp_path, Budget(steps=8), module=Words(), data=lines(), techniques=[technique]).summary
    tokens = 4 * 16
    assert summary["flops_realised"] == 8 * 3 * Words.TOKEN * tokens
    assert summary["flops_counted"] == 8 * 2 * Words.TOKEN * tokens


class Orthogonal(torch.optim.SGD):
    """Multiplies matrices in its step, as Muon does."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim == 2:
                    p @ p.T
        return loss


def test_an_optimizer_that_multiplies_matrices_is_counted_once_a_step(tmp_path):
    class Module(Words):
        def configure_optimizers(self):
            return Orthogonal([self.last.weight], lr=0.1)

    module = Module()
    module.embed.requires_grad_(False)
    summary = train(tmp_path, Budget(steps=5), module=module, data=lines(batch=2), accumulate_grad_batches=2).summary
    assert summary["flops_realised"] == 5 * (2 * Words.TOKEN * 4 * 16 + 2 * 16 * 8 * 16)
