"""Structured pruning in a run: what is cut with the weights, and that the run goes on as if nothing were."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy import ACCUMULATE, STEPS, Explode, Exploded, fingerprint, held_out, loader, toy

from shoestring.callbacks import StructuredPruning, WeightAveraging
from shoestring.callbacks.contract import BadSetting, IncompatibleTechniques
from shoestring.callbacks.parameters.cut import Cut
from shoestring.callbacks.sparsity.reshape import CannotReshape
from shoestring.callbacks.sparsity.structured_groups import (
    CannotTrace,
    NothingToCut,
)
from shoestring.trainer import Trainer
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.ledger import read

pytestmark = pytest.mark.filterwarnings("ignore")


def kept(cut: Cut) -> dict[str, list[tuple[int, list[int]]]]:
    return {name: [(dim, index.tolist()) for dim, index in dims] for name, dims in cut.indices().items()}


# -- a run -----------------------------------------------------------------------------------------------------------
class Both(pl.Callback):
    """What the optimizer holds at the start of every step; one before and one after the technique see both shapes."""

    def __init__(self) -> None:
        self.seen: list[dict[str, dict[str, torch.Tensor]]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            state = trainer.optimizers[0].state
            held = {n: {"weight": p, **state.get(p, {})} for n, p in pl_module.named_parameters()}
            self.seen.append({n: {k: v.detach().clone() for k, v in s.items()} for n, s in held.items()})


def plain(technique: pl.Callback, *others: pl.Callback, module: Any = None, **options: Any) -> tuple[Any, pl.Trainer]:
    before = [c for c in others if c is others[0]]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=6, max_epochs=-1, accumulate_grad_batches=ACCUMULATE, logger=False,
        callbacks=[*before, technique, *others[1:]], enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, limit_val_batches=0, **options,
    )  # fmt: skip
    module = module or toy()
    trainer.fit(module, loader())
    return module, trainer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_optimizer_state_is_cut_by_the_same_indices(optimizer):
    technique, before, after = StructuredPruning(at="3 steps"), Both(), Both()
    plain(technique, before, after, module=toy(optimizer=optimizer))
    one, two = before.seen[3], after.seen[3]
    for name in ("blocks.0", "blocks.1"):
        wide, narrow = one[f"{name}.wide.weight"]["weight"], one[f"{name}.narrow.weight"]["weight"]
        norms = wide.square().sum(1) + one[f"{name}.wide.bias"]["weight"].square() + narrow.square().sum(0)
        stay = norms.argsort(descending=True)[:16].sort().values
        states = {"weight", "exp_avg", "exp_avg_sq"} if optimizer == "adamw" else {"weight", "momentum_buffer"}
        for state in states:
            for part in ("wide.weight", "wide.bias"):
                assert torch.equal(two[f"{name}.{part}"][state], one[f"{name}.{part}"][state][stay]), (part, state)
            narrowed = one[f"{name}.narrow.weight"][state][:, stay]
            assert torch.equal(two[f"{name}.narrow.weight"][state], narrowed)
            assert torch.equal(two["head.weight"][state], one["head.weight"][state]), "what is not cut stays"
    if optimizer == "adamw":
        assert all(held["step"] == 3 for name, held in two.items() if "step" in held)
    assert before.seen[4]["blocks.0.wide.weight"]["weight"].shape == (16, 11)


def test_a_cut_of_zeros_changes_no_loss():
    """Half of the neurons take no part and get no gradient: training with and without them is the same."""

    class Losses(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.seen.append(float(outputs["loss"]))

    def trained(technique):
        module, losses = toy(dropout=0.0), Losses()
        for block in module.blocks:
            for tensor in (block.wide.weight, block.wide.bias):
                tensor.data[16:] = 0
            block.narrow.weight.data[:, 16:] = 0  # gelu(0) = 0, so neither side gets a gradient
        torch.manual_seed(3)
        plain(technique, losses, module=module)
        return losses.seen

    cut, uncut = trained(StructuredPruning(at="2 steps")), trained(StructuredPruning.noop())
    assert cut == pytest.approx(uncut, abs=1e-6)


def test_moments_cut_equal_parts():
    """64 neurons, half of them in two goes: 48, then 32."""

    class Wide(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))
            self.widths = []

        def training_step(self, batch, index):
            return self.net(batch[0]).square().mean()

        def on_train_batch_end(self, outputs, batch, index):
            self.widths.append(self.net[0].out_features)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Wide()
    technique = StructuredPruning(at=["2 steps", "4 steps"])
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=6, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[technique],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=4))
    assert module.widths == [64, 64, 48, 48, 32, 32]


def test_taylor_keeps_what_moves_the_loss():
    """The saliency at the cut is 0.9 of that before plus 0.1 of (weight x gradient)^2, summed over each neuron."""
    seen = []

    class Recorder(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            named = pl_module.blocks[0].named_parameters()
            seen.append({name: (p * p.grad).square().detach() for name, p in named})

    technique = StructuredPruning(importance="taylor", at="2 steps")
    plain(technique, Recorder())
    first, second = seen[:2]
    mean = {name: 0.9 * first[name] + 0.1 * second[name] for name in first}
    each = mean["wide.weight"].sum(1) + mean["wide.bias"] + mean["narrow.weight"].sum(0)
    stay = each.argsort(descending=True)[:16].sort().values.tolist()
    (cut,) = technique.state_dict()["cuts"]
    assert kept(Cut.of(cut))["blocks.0.wide.weight"] == [(0, stay)]
    by_size = toy().blocks[0]
    norms = by_size.wide.weight.square().sum(1) + by_size.wide.bias.square() + by_size.narrow.weight.square().sum(0)
    assert stay != norms.argsort(descending=True)[:16].sort().values.tolist(), "or nothing is shown"


def test_lasso_takes_strength_times_rate_off_each_norm():
    """One step of SGD with rate 0 cannot move weights; the proximal step with that of the group can."""
    seen = []

    class Recorder(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(pl_module.blocks[0].wide.weight.detach().clone())

    first, last = Recorder(), Recorder()
    plain(StructuredPruning(importance="lasso", at="5 steps", strength=3.0), first, last)
    before, after = seen[0].norm(dim=1), seen[1].norm(dim=1)
    assert torch.allclose(before - after, torch.full_like(before, 3.0 * 1e-2), atol=1e-6)


# -- in our trainer --------------------------------------------------------------------------------------------------
def ours(folder: Path, *callbacks: pl.Callback, technique: Any = None, every: str | None = "2 steps") -> Trainer:
    trainer = Trainer(
        techniques=[technique or StructuredPruning(at="5 steps"), WeightAveraging(decay=0.8)], run_dir=folder / "run",
        ledger=False, accelerator="cpu", checkpoint_every=every, accumulate_grad_batches=ACCUMULATE, max_steps=STEPS,
        max_epochs=-1, num_sanity_val_steps=0, callbacks=list(callbacks), log_every=1,
    )  # fmt: skip
    trainer.fit(toy(), loader(), held_out())
    return trainer


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "run" / "final")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    ours(folder)
    return folder


def test_the_run_is_one_run(whole):
    rows = list(read(whole / "run" / "events", rank=0))
    events = [dict(row.fields) for row in rows if row.kind == "event"]
    (reshaped,) = [event for event in events if event["event"] == "reshape"]
    cut = 7 * 2 * (11 + 1 + 11)  # neurons x blocks x (row, bias, column)
    assert reshaped["step"] == 5 and reshaped["trainable"] == sum(p.numel() for p in toy().parameters() if
                                                                  p.requires_grad) - cut  # fmt: skip
    assert 5 in [event["step"] for event in events if event["event"] == "checkpoint"], "saved in the old shapes"
    assert [row.fields["step"] for row in rows if row.kind == "step" and "loss" in row.fields] == list(
        range(1, STEPS + 1)
    )
    assert len([event for event in events if event["event"] == "start"]) == 1
    assert final(whole)["blocks.0.wide.weight"].shape == (16, 11)


def test_flops_and_size_fall_with_the_width(whole):
    """The multiplications of a step, by hand: 16 tokens x (what a block multiplies) x forward, backward to both."""
    rows = [row.fields for row in read(whole / "run" / "events", rank=0) if row.kind == "step" and "loss" in row.fields]
    totals = [0.0, *(row["flops_realised"] for row in rows)]
    steps = [b - a for a, b in pairwise(totals)]
    assert len({*steps[:5]}) == len({*steps[5:]}) == 1
    tokens, neurons = 8 * 16, 23 - 16
    assert steps[0] - steps[5] == 2 * tokens * 11 * neurons * 2 * 2 * 3  # multiply-add, layers, blocks, passes


@pytest.mark.parametrize(("crash", "from_step"), [(3, 2), (5, 5), (6, 6), (9, 8)])
def test_crashed_before_at_and_after_ends_bit_for_bit(crash, from_step, whole, tmp_path):
    with pytest.raises(Exploded):
        ours(tmp_path, Explode(crash))
    trainer = ours(tmp_path)
    assert trainer.summary["resumed_from"] == from_step
    assert fingerprint(final(tmp_path)) == fingerprint(final(whole))


def test_a_damaged_checkpoint_after_the_cut_falls_back_to_one_before(whole, tmp_path):
    with pytest.raises(Exploded):
        ours(tmp_path, Explode(6), every=None, technique=StructuredPruning(at="5 steps"))
    saved = sorted((tmp_path / "run" / "checkpoints").glob("0*"))
    assert [int(each.name) for each in saved] == [1, 5]
    (saved[-1] / "state.pt").write_bytes(b"damaged")
    assert ours(tmp_path).summary["resumed_from"] == 1
    assert fingerprint(final(tmp_path)) == fingerprint(final(whole))


# -- what cannot be --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("setting", "value"),
    [("ratio", 1.0), ("ratio", -0.1), ("importance", "size"), ("round_to", 0), ("at", []), ("at", ["50%", "20%"]),
     ("at", ["1 steps", "50%"]), ("strength", -1)],
)  # fmt: skip
def test_bad_settings(setting, value):
    with pytest.raises(BadSetting, match=setting):
        StructuredPruning(**{setting: value}).check()


def test_taylor_needs_steps_to_see():
    with pytest.raises(BadSetting, match="after the start"):
        StructuredPruning(importance="taylor", at="0%").check()


def test_what_is_skipped_keeps_its_shape():
    module, _ = plain(StructuredPruning(at="1 steps", skip=["blocks.0.*"]), Both())
    assert [block.wide.out_features for block in module.blocks] == [23, 16]
    with pytest.raises(NothingToCut, match=r"skip=\['\*'\]"):
        plain(StructuredPruning(at="1 steps", skip=["*"]), Both())


def test_manual_optimization_is_refused():
    module = toy()
    module.automatic_optimization = False
    with pytest.raises(IncompatibleTechniques, match="leave the optimizer to Lightning"):
        trainer = pl.Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
                             enable_progress_bar=False, callbacks=[StructuredPruning()])  # fmt: skip
        trainer.fit(module, loader())


def test_a_width_written_into_forward_names_the_way_out():
    class Fixed(type(toy())):
        def forward(self, ids):
            hidden = self.blocks[0].wide(self.embed(ids))
            return self.head(self.blocks[0].narrow(hidden.reshape(-1, 23)).view(*ids.shape, -1).mean(1))

    torch.manual_seed(0)
    with pytest.raises(CannotTrace, match="name its parameters in structured_pruning's `skip`"):
        plain(StructuredPruning(at="1 steps"), Both(), module=Fixed())


def test_an_optimizer_with_states_of_its_own_shape_is_refused():
    module = toy()
    module.configure_optimizers = lambda: torch.optim.Adafactor(module.parameters())
    with pytest.raises(CannotReshape, match="AdamW"):
        plain(StructuredPruning(at="1 steps"), Both(), module=module)
