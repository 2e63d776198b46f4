"""Structured pruning: which indices are kept, what is cut with them, and that the run goes on as if nothing were."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import structured_ranks
import torch
import train_script
from processes import last_words, run, succeed
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy import ACCUMULATE, STEPS, Explode, Exploded, fingerprint, held_out, loader, toy

from shoestring.callbacks import StructuredPruning, WeightAveraging
from shoestring.callbacks.contract import BadSetting, Unfit
from shoestring.callbacks.cut import (
    Cut,
    WrongShape,
    is_shrunk,
    rebuild_model,
    shrink,
    shrink_tensor,
    tell_configurations,
)
from shoestring.callbacks.reshape import CannotReshape
from shoestring.callbacks.sparsity.structured_groups import (
    CannotTrace,
    Member,
    NothingToCut,
    choose,
    importance,
    keep,
    width,
)
from shoestring.trainer import Trainer
from shoestring.trainer.ledger import read

pytestmark = pytest.mark.filterwarnings("ignore")


def squares(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().square() for name, p in module.named_parameters()}


def kept(cut: Cut) -> dict[str, list[tuple[int, list[int]]]]:
    return {name: [(dim, index.tolist()) for dim, index in dims] for name, dims in cut.indices().items()}


def whole_numbers(module: nn.Module) -> nn.Module:
    """Weights of small whole numbers: sums of their products are exact in whatever order they are taken."""
    draw = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.randint(-4, 5, p.shape, generator=draw).float()
    return module.eval()


# -- numbers ---------------------------------------------------------------------------------------------------------
def test_importance_sums_what_goes_with_a_channel():
    """Two channels: rows of `a`, and of `b` columns 0-1 and 2-3."""
    scores = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([[1.0, 0.0, 5.0, 0.0]])}
    rows = Member("a", 0, torch.tensor([0, 1]), torch.tensor([0, 1]))
    columns = Member("b", 1, torch.arange(4), torch.tensor([0, 0, 1, 1]))
    unknown = Member("c", 0, torch.arange(2), torch.arange(2))
    assert importance([rows, columns, unknown], 2, scores).tolist() == [1 + 2 + 1, 3 + 4 + 5]


@pytest.mark.parametrize(
    ("channels", "ratio", "round_to", "left"),
    [
        (6, 0.5, 1, 3), (1536, 0.5, 16, 768), (384, 0.3, 16, 272), (48, 0.5, 16, 32), (23, 0.5, 16, 16),
        (23, 0.0, 16, 23), (8, 0.5, 16, 4), (4, 0.99, 1, 1), (40, 0.05, 16, 32), (64, 0.99, 16, 16),
    ],
)  # fmt: skip
def test_width(channels, ratio, round_to, left):
    assert width(channels, ratio, round_to) == left


def test_keep_takes_the_first_of_equals_and_whole_heads():
    assert keep(torch.tensor([1.0, 3.0, 1.0, 2.0]), 0.5).tolist() == [1, 3]
    assert keep(torch.ones(4), 0.5).tolist() == [0, 1]
    heads = torch.tensor([5.0, 0.0, 1.0, 1.0, 3.0, 3.0])  # three of two channels: 5, 2 and 6
    assert keep(heads, 0.3, unit=2, round_to=16).tolist() == [0, 1, 4, 5]


def test_shrink_tensor_by_hand():
    tensor = torch.arange(12.0).view(3, 4)
    rows, columns = torch.tensor([True, False, True]), torch.tensor([False, True, True, False])
    assert shrink_tensor(tensor, [(0, rows), (1, columns)]).tolist() == [[1, 2], [9, 10]]
    with pytest.raises(WrongShape, match="3 indices, and the cut is of 4"):
        shrink_tensor(tensor, [(0, columns)])


# -- models ----------------------------------------------------------------------------------------------------------
def test_mlp_by_hand():
    """Squares of row, bias and column of each neuron: 9+0+1, 0+1+0, 0+0+16, 2+0+1."""
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    net[0].weight.data = torch.tensor([[3.0, 0], [0, 0], [0, 0], [1, 1]])
    net[0].bias.data = torch.tensor([0.0, 1, 0, 0])
    net[2].weight.data = torch.tensor([[1.0, 0, 4, 1]])
    x = torch.randn(5, 2)
    cut = choose(net, lambda: net(x), squares(net), ratio=0.5, round_to=1)
    assert kept(cut) == {"0.weight": [(0, [0, 2])], "0.bias": [(0, [0, 2])], "2.weight": [(1, [0, 2])]}
    assert net[0].weight.shape == (4, 2) and net[0].out_features == 4, "choosing changes nothing"
    shrink(net, cut)
    assert net[0].weight.tolist() == [[3, 0], [0, 0]] and net[2].weight.tolist() == [[1, 4]]
    assert (net[0].out_features, net[2].in_features) == (2, 2)


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3),
    )  # fmt: skip


def test_conv_net_equals_the_masked_dense_one_exactly():
    """Norms, depthwise convolutions and flattened maps are cut along; cut channels were zero, so nothing changes."""
    net, x = whole_numbers(conv_net()), torch.randint(-3, 4, (4, 2, 4, 4)).float()
    net[1].running_mean.copy_(torch.arange(8))
    gone, flat = [1, 4, 6], [0, 5]
    for part in (net[0], net[1], net[3]):
        part.weight.data[gone] = 0
        part.bias.data[gone] = 0
    net[5].weight.data[:, gone] = 0
    net[5].weight.data[flat] = net[5].bias.data[flat] = 0
    net[8].weight.data[:, [4 * c + i for c in flat for i in range(4)]] = 0
    before = net(x)
    cut = choose(net, lambda: net(x), squares(net), ratio=1 / 3, round_to=1)
    stay, columns = [0, 2, 3, 5, 7], [4 * c + i for c in (1, 2, 3, 4) for i in range(4)]
    assert kept(cut)["5.weight"] == [(0, [1, 2, 3, 4]), (1, stay)]
    assert kept(cut)["1.running_mean"] == [(0, stay)] == kept(cut)["3.weight"]
    assert kept(cut)["8.weight"] == [(1, columns)]
    shrink(net, cut)
    assert torch.equal(net(x), before)
    assert net[3].groups == 5 and net[1].running_mean.tolist() == stay
    assert is_shrunk(net, cut)


def bert(heads: int = 4) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": heads}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=50, max_position_embeddings=20)).eval()


def test_bert_loses_heads_and_neurons_and_comes_back_from_disk(tmp_path):
    model, ids = bert(), torch.randint(0, 50, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    for layer in model.bert.encoder.layer:
        attention, output = layer.attention.self, layer.attention.output.dense
        for part in (attention.query, attention.key, attention.value):
            part.weight.data[8:16] = part.weight.data[24:] = part.bias.data[8:16] = part.bias.data[24:] = 0
        output.weight.data[:, 8:16] = output.weight.data[:, 24:] = 0
        layer.intermediate.dense.weight.data[::2] = layer.intermediate.dense.bias.data[::2] = 0
        layer.output.dense.weight.data[:, ::2] = 0
    run_it = lambda m: m(input_ids=ids, attention_mask=mask)  # noqa: E731
    before = run_it(model).logits
    cut = choose(model, lambda: run_it(model).logits, squares(model), ratio=0.5, skip=["*pooler*"])
    state = json.loads(json.dumps(cut.state()))
    assert Cut.of(state).state() == cut.state()
    shrink(model, cut)
    two = [*range(8), *range(16, 24)]
    name = "bert.encoder.layer.1.attention"
    for part in ("query", "key", "value"):
        assert kept(cut)[f"{name}.self.{part}.weight"] == [(0, two)]
    assert kept(cut)[f"{name}.output.dense.weight"] == [(1, two)]
    assert kept(cut)["bert.encoder.layer.0.output.dense.weight"] == [(1, list(range(1, 64, 2)))]
    attention = model.bert.encoder.layer[1].attention.self
    assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (2, 16, 8)
    assert not any("embeddings" in n or "LayerNorm" in n or "pooler" in n for n in cut.kept)
    assert torch.allclose(run_it(model).logits, before, atol=1e-6)

    tell_configurations(model, [state])
    model.save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    assert config.num_attention_heads == 4, "the configuration describes the whole model"
    again = rebuild_model(type(model)(config), config.structured_cut).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(run_it(again).logits, run_it(model).logits)
    assert rebuild_model(again, config.structured_cut) is again and is_shrunk(again, cut), "once is enough"


def test_pretrained_minilm_loses_half_of_its_heads_and_neurons():
    from transformers import AutoModel

    from shoestring.trainer.tasks.models import resolve_name

    model = AutoModel.from_pretrained(resolve_name("minilm")).eval()
    ids = torch.randint(0, 1000, (2, 9))
    whole = sum(p.numel() for p in model.encoder.parameters())
    forward = lambda: model(input_ids=ids).last_hidden_state  # noqa: E731
    cut = choose(model, forward, squares(model), ratio=0.5)
    shrink(model, cut)
    assert forward().shape == (2, 9, 384)
    assert {layer.attention.self.num_attention_heads for layer in model.encoder.layer} == {6}
    assert {layer.intermediate.dense.out_features for layer in model.encoder.layer} == {768}
    assert sum(p.numel() for p in model.encoder.parameters()) / whole == pytest.approx(0.5, abs=0.01)


def test_a_stream_that_comes_from_outside_stays_whole():
    """Without embeddings nothing but the sum shows that the width of the encoder is that of its input."""
    encoder, x = bert().bert.encoder, torch.randn(2, 5, 32)
    forward = lambda: encoder(x).last_hidden_state  # noqa: E731
    cut = choose(encoder, forward, squares(encoder), ratio=0.5)
    assert {name.split(".", 2)[2] for name in cut.kept} == {
        *(f"attention.self.{part}.{p}" for part in ("query", "key", "value") for p in ("weight", "bias")),
        "attention.output.dense.weight", "intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight",
    }  # fmt: skip
    shrink(encoder, cut)
    assert forward().shape == x.shape
    normed = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    cut = choose(normed, lambda: normed(torch.ones(2, 3)), squares(normed), ratio=0.5, round_to=1)
    shrink(normed, cut)
    assert normed(torch.ones(2, 3)).shape == (2, 2) and normed[1].normalized_shape == (4,)


def test_the_importance_decides_which_head_stays():
    """All heads alike but in the scores given."""
    model, ids = bert(), torch.randint(0, 50, (2, 5))
    scores = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    scores["bert.encoder.layer.0.attention.self.value.weight"][17] = 1  # head 2
    scores["bert.encoder.layer.0.attention.output.dense.weight"][:, 1] = 1  # head 0
    cut = choose(model, lambda: model(input_ids=ids).logits, scores, ratio=0.5)
    two = [*range(8), *range(16, 24)]
    assert kept(cut)["bert.encoder.layer.0.attention.self.key.weight"] == [(0, two)]


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

    cut, uncut = trained(StructuredPruning(at="2 steps")), trained(StructuredPruning.inert())
    assert cut == pytest.approx(uncut, abs=1e-6)


def test_moments_cut_equal_parts():
    """64 neurons, half of them in two goes: 48, then 32."""

    class Wide(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))
            self.widths = []

        def training_step(self, batch, index):
            self.widths.append(self.net[0].out_features)
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Wide()
    technique = StructuredPruning(at=["2 steps", "4 steps"])
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=6, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[technique],
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=4))
    traced = [w for i, w in enumerate(module.widths) if i not in (2, 3, 6, 7)]  # traced and tried out at each cut
    assert traced == [64, 64, 48, 48, 32, 32]


def test_taylor_keeps_what_moves_the_loss():
    """The saliency at the cut is 0.9 of that before plus 0.1 of (weight x gradient)^2, summed over each neuron."""
    seen = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            named = pl_module.blocks[0].named_parameters()
            seen.append({name: (p * p.grad).square().detach() for name, p in named})

    technique = StructuredPruning(importance="taylor", at="2 steps")
    plain(technique, Watch())
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

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen.append(pl_module.blocks[0].wide.weight.detach().clone())

    first, last = Watch(), Watch()
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
    return load_file(folder / "run" / "final.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    ours(folder)
    return folder


def test_the_run_is_one_run(whole):
    rows = list(read(whole / "run" / "events", rank=0))
    told = [dict(row.fields) for row in rows if row.kind == "event"]
    (reshaped,) = [event for event in told if event["event"] == "reshape"]
    cut = 7 * 2 * (11 + 1 + 11)  # neurons x blocks x (row, bias, column)
    assert reshaped["step"] == 5 and reshaped["trainable"] == sum(p.numel() for p in toy().parameters() if
                                                                  p.requires_grad) - cut  # fmt: skip
    assert 5 in [event["step"] for event in told if event["event"] == "checkpoint"], "saved in the old shapes"
    assert [row.fields["step"] for row in rows if row.kind == "step" and "loss" in row.fields] == list(
        range(1, STEPS + 1)
    )
    assert len([event for event in told if event["event"] == "start"]) == 1
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
    found = sorted((tmp_path / "run" / "checkpoints").glob("0*"))
    assert [int(each.name) for each in found] == [1, 5]
    (found[-1] / "state.pt").write_bytes(b"damaged")
    assert ours(tmp_path).summary["resumed_from"] == 1
    assert fingerprint(final(tmp_path)) == fingerprint(final(whole))


# -- ranks -----------------------------------------------------------------------------------------------------------
def of_step(reports: list[dict]) -> list[float]:
    micro = [sum(losses) / len(reports) for losses in zip(*(r["losses"] for r in reports), strict=True)]
    return [sum(micro[i : i + ACCUMULATE]) / ACCUMULATE for i in range(0, len(micro), ACCUMULATE)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    succeed(structured_ranks.main, "single", folder, world=1, folder=folder, timeout=200)
    return json.loads((folder / "rank-0.json").read_text())


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_two_ranks_cut_alike_and_resume(strategy, alone, tmp_path):
    """Two cuts by Taylor saliency, a group lasso, averages and masks that are cut along."""
    succeed(structured_ranks.main, strategy, tmp_path, world=2, folder=tmp_path, timeout=240)
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for case in structured_ranks.CASES:
        for report in (alone, *found):
            assert "error" not in report[case], report[case]["error"]
        together = of_step([report[case]["still"] for report in found])
        drift = max(abs(a - b) for a, b in zip(of_step([alone[case]["still"]]), together, strict=True))
        assert drift < 2e-5, case
        for report in found:
            before, after = report[case]["whole"], report[case]["resumed"]
            assert after["losses"] == before["losses"][after["resumed_from"] * ACCUMULATE :], case
            for part in ("final", "masters", "fragments", "steps", "samples"):
                assert after[part] == before[part], (case, part)


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2)])
@pytest.mark.parametrize("step", [2, 3, 5], ids=["before", "at", "after"])
def test_killed_around_the_cut_ends_bit_for_bit(step, strategy, world, tmp_path):
    """The example cuts when three steps are done."""
    ranks = [random.Random(f"{strategy} {step}").randrange(world)]
    mishap = {"step": step, "part": int(step == 3), "ranks": ranks, "signal": "SIGKILL"}
    command = (train_script.kill_and_compare, tmp_path, strategy, world, "structured_pruning", mishap)
    assert run(*command, world=world, folder=tmp_path)[ranks[0]] == -9, last_words(tmp_path)
    succeed(*command, world=world, folder=tmp_path)
    assert fingerprint(final(tmp_path / "broken")) == fingerprint(final(tmp_path / "whole")), last_words(tmp_path)


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
    with pytest.raises(Unfit, match="leave the optimizer to Lightning"):
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


def test_a_cut_of_another_model():
    with pytest.raises(WrongShape, match=r"no 9\.weight"):
        shrink(conv_net(), Cut({"9.weight": ((0, torch.tensor([True, False])),)}, {}))
