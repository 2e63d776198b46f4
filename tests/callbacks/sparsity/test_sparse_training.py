"""Sparse techniques at work on a model small enough to look at every weight after every step."""

from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from small import QUIET, train
from torch import nn

from shoestring.callbacks import (
    NM,
    SET,
    SNIP,
    GradualPruning,
    GraSP,
    LotteryTicket,
    MovementPruning,
    RigL,
    SynFlow,
    TopKAST,
)
from shoestring.callbacks.contract import IncompatibleTechniques, Misconfigured
from shoestring.callbacks.forward.forward_weights import NeverUsed
from shoestring.trainer import Budget

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


class Net(pl.LightningModule):
    """8-40-25, so that 320 and 1000 weights may be pruned."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 40), nn.GELU(), nn.Linear(40, 25))

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - 1).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


NAMES = ("net.0.weight", "net.2.weight")


class Recorder(pl.Callback):
    """What layers compute with in every step, and what the weights are after it."""

    def __init__(self):
        self.used, self.weights = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for layer in (pl_module.net[0], pl_module.net[2]) if not self.used else ():  # after every technique's own hooks
            layer.register_forward_pre_hook(lambda layer, inputs: self.used[-1].append(layer.weight.detach().clone()))
        self.used.append([])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append([pl_module.net[i].weight.detach().clone() for i in (0, 2)])


def run(folder, technique, steps=20, **options):
    recorder, module = Recorder(), Net()
    trainer = train(folder, Budget(steps=steps), module=module, techniques=[technique], callbacks=[recorder], **options)
    return module, recorder, trainer


def zeros(tensors):
    return [int((t == 0).sum()) for t in tensors]


@pytest.mark.parametrize("cls", [SET, RigL])
def test_connections_move_and_their_number_stays(cls, tmp_path):
    technique = cls(sparsity=0.8, distribution="uniform", every=4, drop_fraction=0.5, stop="75%")
    module, recorder, _ = run(tmp_path, technique)
    assert all(zeros(used) == [256, 800] for used in recorder.used[:4]), "sparse from the first forward on"
    masks = [[w != 0 for w in weights] for weights in recorder.weights]
    moved = [step for step, (a, b) in enumerate(pairwise(masks), 1) if not torch.equal(a[1], b[1])]
    assert moved and set(moved) <= {4, 8, 12}, "every fourth step, until 75 % of twenty"
    assert technique.densities() == pytest.approx(dict.fromkeys(NAMES, 0.2))
    assert max(zeros([module.net[2].weight])) >= 800


def test_initial_weights_are_scaled_by_the_root_of_their_density(tmp_path):
    plain = Net().net[2].weight.detach()
    _, recorder, _ = run(tmp_path, SET(sparsity=0.75, distribution="uniform"), steps=1)
    used = recorder.used[0][1]
    assert torch.allclose(used[used != 0], plain[used != 0] * 2)


def test_static_sparse_training_is_set_that_drops_nothing(tmp_path):
    _, recorder, _ = run(tmp_path, SET(sparsity=0.8, drop_fraction=0.0, every=1))
    masks = [weights[1] != 0 for weights in recorder.weights]
    assert all(torch.equal(masks[0], mask) for mask in masks)


def test_from_a_trained_model_the_largest_weights_are_kept(tmp_path):
    technique = RigL(sparsity=0.5, distribution="uniform", start_from="magnitude", rescale=False)
    _, recorder, _ = run(tmp_path, technique, steps=1)
    plain, used = Net().net[2].weight.detach().abs(), recorder.used[0][1]
    assert plain[used != 0].min() >= plain[used == 0].max()


def test_top_kast_uses_few_weights_and_learns_more(tmp_path):
    technique = TopKAST(sparsity=0.8, backward_sparsity=0.5, every=5, penalty=0.0)
    module, recorder, _ = run(tmp_path, technique)
    assert all(zeros(used) == [256, 800] for used in recorder.used)
    assert zeros(recorder.weights[3]) == [0, 0], "the weights themselves are dense"
    assert zeros([module.net[0].weight, module.net[2].weight]) == [256, 800], "until the run has ended"
    before, after = recorder.weights[1][1], recorder.weights[2][1]
    decayed = (after / before).median()
    unlearned = ((after / before - decayed).abs() < 1e-4).float().mean()
    assert 0.45 < unlearned < 0.6, "half of the weights only decay"


def test_movement_pruning_keeps_what_moves_from_zero(tmp_path):
    technique = MovementPruning(sparsity=0.6, start="10%", end="70%", every=2, distribution="uniform")
    module, recorder, _ = run(tmp_path, technique)
    used = [zeros(step) for step in recorder.used]
    assert used[0] == [0, 0] and used[-1] == [192, 600]
    assert all(a <= b for (a, _), (b, _) in pairwise(used))
    score, mask = technique.fragments()["score"]["net.2.weight"], technique.fragments()["forward"]["net.2.weight"]
    assert score[mask].median() > score[~mask].median()
    assert zeros([module.net[2].weight]) == [600]


def test_n_of_m_in_every_forward_and_at_the_end(tmp_path):
    module, recorder, _ = run(tmp_path, NM(n=1, m=4))
    for weight in (*(w for step in recorder.used for w in step), module.net[0].weight.detach(), module.net[2].weight):
        assert ((weight.reshape(weight.shape[0], -1, 4) != 0).sum(-1) <= 1).all()
    assert zeros(recorder.weights[-1]) == [0, 0]


def test_unused_weights_of_n_m_decay(tmp_path):
    quiet, left, _ = run(tmp_path / "a", NM(n=2, m=4, decay=0.0), steps=10)
    pulled, recorder, _ = run(tmp_path / "b", NM(n=2, m=4, decay=10.0), steps=10)
    size = [torch.stack([w.abs().min(-1).values.mean() for w in seen.weights[-1]]) for seen in (left, recorder)]
    assert (size[1] < size[0]).all(), "the smallest of a row is never used"
    assert not torch.equal(quiet.net[2].weight, pulled.net[2].weight)


@pytest.mark.parametrize("cls", [SNIP, GraSP, SynFlow])
def test_pruned_before_the_first_step(cls, tmp_path):
    technique = cls(sparsity=0.75, samples=16)
    module, recorder, _ = run(tmp_path, technique, steps=6)
    assert sum(zeros(recorder.used[0])) == 990
    masks = [[w != 0 for w in weights] for weights in recorder.weights]
    assert all(torch.equal(a, b) for of_step in masks for a, b in zip(masks[0], of_step, strict=True))
    assert "log" not in vars(module)


def test_snip_keeps_what_the_loss_depends_on(tmp_path):
    """Half of the inputs are always 0: weights from them have no gradient and go first."""
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(32, 8) * torch.tensor([1.0] * 4 + [0.0] * 4)), 4
    )
    _, recorder, _ = run(tmp_path, SNIP(sparsity=0.5, distribution="uniform", samples=32), steps=1, data=data)
    assert (recorder.used[0][0][:, 4:] == 0).all() and (recorder.used[0][0][:, :4] != 0).all()


def test_synflow_cuts_no_layer_off(tmp_path):
    _, recorder, _ = run(tmp_path, SynFlow(sparsity=0.97, samples=1), steps=1)
    assert all((used != 0).any() for used in recorder.used[0])


def test_a_lottery_ticket_rewinds(tmp_path):
    technique = LotteryTicket(sparsity=0.75, rounds=2, rewind="2 steps", distribution="uniform")
    _, recorder, _ = run(tmp_path, technique, steps=21)
    kept = list(map(zeros, recorder.used))
    assert kept[0] == [0, 0] and kept[8] == [160, 500] and kept[-1] == [240, 750]
    early, rewound = recorder.weights[1][1], recorder.weights[7][1]
    assert torch.allclose(rewound[rewound != 0], early[rewound != 0], atol=2e-3), "but for one step of weight decay"


@pytest.mark.parametrize("pattern", ["1x*", "4x4"])
def test_blocks_go_as_a_whole(pattern, tmp_path):
    module, _, _ = run(tmp_path, GradualPruning(sparsity=0.5, pattern=pattern, every=2))
    weight = module.net[2].weight.detach() != 0
    tiles = weight[:24].view(6, 4, 10, 4).float().mean((1, 3)) if pattern == "4x4" else weight.float().mean(1)
    assert set(tiles.unique().tolist()) == {0.0, 1.0}
    assert 0.4 < weight.float().mean() < 0.6


@pytest.mark.parametrize("criterion", ["taylor", "gradient"])
def test_other_criteria_choose_other_weights(criterion, tmp_path):
    by_magnitude, _, _ = run(tmp_path / "a", GradualPruning(sparsity=0.5, every=2))
    module, _, _ = run(tmp_path / "b", GradualPruning(sparsity=0.5, every=2, criterion=criterion))
    assert zeros([module.net[2].weight]) == zeros([by_magnitude.net[2].weight]) == [500]
    assert not torch.equal(module.net[2].weight == 0, by_magnitude.net[2].weight == 0)


class Attention(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def training_step(self, batch, batch_idx):
        return self.attention(batch[0], batch[0], batch[0])[0].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_weight_that_cannot_be_masked_in_the_forward_is_named(tmp_path):
    with pytest.raises(NeverUsed, match=r"n_m: attention\.out_proj\.weight"):
        train(tmp_path, Budget(steps=2), module=Attention(), techniques=[NM()])


def test_nothing_to_prune_is_said(tmp_path):
    with pytest.raises(IncompatibleTechniques, match=r"rigl finds no weight to prune after skip=\['net.*'\]"):
        train(tmp_path, Budget(steps=2), module=Net(), techniques=[RigL(skip=["net*"])])


@pytest.mark.parametrize(
    ("technique", "named"),
    [
        (RigL(sparsity=1.0), "rigl: sparsity=1.0"),
        (SET(distribution="global"), "set: distribution='global'.*uniform | erk"),
        (SET(distribution={"a": 1.5}), "set: distribution="),
        (RigL(drop_fraction=2), "rigl: drop_fraction=2"),
        (RigL(start_from="zero"), "rigl: start_from='zero'"),
        (TopKAST(sparsity=0.5, backward_sparsity=0.6), "top_kast: backward_sparsity=0.6"),
        (NM(n=5, m=4), "n_m: n=5.*from 1 to m=4"),
        (MovementPruning(start="70%", end="10%"), "movement_pruning: end='10%'"),
        (LotteryTicket(rewind="50%"), "lottery_ticket: rewind='50%'.*before the first of 3 rounds"),
        (SNIP(samples=0), "snip: samples=0"),
        (GradualPruning(pattern="2:4"), "gradual_pruning: pattern='2:4'"),
        (GradualPruning(pattern="4x4", distribution="global"), "gradual_pruning: distribution='global'"),
    ],
)
def test_settings_out_of_range_are_named(technique, named):
    with pytest.raises(Misconfigured, match=named):
        technique.check()
