"""Stochastic depth: what is drawn, what a skipped block does and costs, and what evaluation sees."""

from __future__ import annotations

import json
import warnings

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import succeed
from torch import nn
from toy import ACCUMULATE, STEPS, held_out, loader, toy
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig

from shoestring.callbacks import GradientCheckpointing, StochasticDepth
from shoestring.callbacks.contract import IncompatibleTechniques
from shoestring.callbacks.forward.blocks import blocks
from shoestring.callbacks.model.stochastic_depth import draw, scaled, survival
from shoestring.callbacks.parameters.accessor import shards_of
from shoestring.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore")


# -- the draw ----------------------------------------------------------------------------------------------------------
def test_chances_fall_linearly_to_the_last():
    """p_l = 1 - l / L (1 - p_L), arXiv 1603.09382 eq. 4."""
    assert [survival(block, 5, 0.5) for block in range(5)] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert survival(0, 1, 0.3) == pytest.approx(0.3)


def test_blocks_are_skipped_as_often_as_they_should():
    chances = [survival(block, 4, 0.2) for block in range(4)]
    drawn = [draw(0, step, chances) for step in range(4000)]
    for block, chance in enumerate(chances):
        share = sum(block not in skipped for skipped in drawn) / len(drawn)
        assert abs(share - chance) < 4 * (chance * (1 - chance) / len(drawn)) ** 0.5
    assert drawn[:9] == [draw(0, step, chances) for step in range(9)] != [draw(1, step, chances) for step in range(9)]


@given(st.floats(-2, 2, width=32), st.floats(-2, 2, width=32), st.floats(0, 1))
def test_what_a_block_adds_is_scaled(before, after, factor):
    assert float(scaled(torch.tensor(before), torch.tensor(after), factor)) == pytest.approx(
        before + factor * (after - before), abs=1e-5
    )


# -- a fit -------------------------------------------------------------------------------------------------------------
class Look(pl.Callback):
    """For every step the blocks that computed, and the gradients of the others."""

    def __init__(self) -> None:
        self.computed: list[set[int]] = []
        self.gradients: list[float] = []
        self._now: set[int] = set()

    def on_train_start(self, trainer, pl_module) -> None:
        for index, block in enumerate(pl_module.blocks):
            block.wide.register_forward_hook(lambda *_, index=index: self._now.add(index))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._now = set()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        shards = shards_of(trainer, pl_module)
        if shards.at_boundary():
            skipped = [
                shards.gradient(name)
                for name in shards.slices
                if name.startswith("blocks.") and int(name.split(".")[1]) not in self._now
            ]
            self.gradients += [float(gradient.abs().sum()) for gradient in skipped if gradient is not None]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.computed.append(set(self._now))


def fit(folder, *techniques, callbacks=(), world=1, strategy="auto", **options):
    module = toy(**options)
    trainer = Trainer(
        techniques=techniques, run_dir=folder, ledger=False, accelerator="cpu", accumulate_grad_batches=ACCUMULATE,
        num_sanity_val_steps=0, max_steps=STEPS, max_epochs=-1, strategy=strategy, devices=world,
    )  # fmt: skip
    trainer.callbacks += callbacks  # they see what techniques have done
    trainer.fit(module, loader(world), held_out())
    return module, trainer


DRAWN = [draw(0, step, [survival(block, 2, 0.4) for block in range(2)]) for step in range(STEPS)]


def test_a_step_computes_the_blocks_that_were_drawn(tmp_path):
    look = Look()
    module, _ = fit(tmp_path, StochasticDepth(last=0.4), callbacks=[look])
    learning = {min(step for step, skipped in enumerate(DRAWN) if block in skipped) for block in range(2)}
    for step, skipped in enumerate(DRAWN):
        for part in range(ACCUMULATE):
            if step in learning and part == 0:
                continue  # a forward more says what a block returns
            assert look.computed[ACCUMULATE * step + part] == {0, 1} - skipped
    assert look.gradients and not any(look.gradients)
    assert {type(block).__name__ for block in module.blocks} == {"Block"} and "_shoestring_layers" not in vars(
        type(module.blocks[0])
    )


def test_flops_are_counted_right_for_every_draw(tmp_path):
    """The head and each block that computes, forward and backward; recomputed ones are realised twice."""
    absent = fit(tmp_path / "absent")[1].summary
    headless = fit(tmp_path / "headless", StochasticDepth(last=1e-9))[1].summary  # nearly all of them are skipped
    assert headless["flops_counted"] < 0.5 * absent["flops_counted"]
    share = sum(2 - len(skipped) for skipped in DRAWN) / (2 * STEPS)
    kept = [draw(0, step, [survival(block, 2, 1e-9) for block in range(2)]) for step in range(STEPS)]
    floor = sum(2 - len(skipped) for skipped in kept) / (2 * STEPS)
    block = (absent["flops_counted"] - headless["flops_counted"]) / (1 - floor)  # of both in every step
    run = fit(tmp_path / "run", StochasticDepth(last=0.4))[1].summary
    expected = absent["flops_counted"] - (1 - share) * block  # what a block was asked aside is no part of it
    assert run["flops_counted"] == pytest.approx(expected, rel=0.02)
    again = fit(tmp_path / "recomputed", StochasticDepth(last=0.4), GradientCheckpointing())[1].summary
    assert again["flops_counted"] == pytest.approx(run["flops_counted"])
    assert again["flops_realised"] > run["flops_realised"]


def test_evaluation_multiplies_what_each_block_adds_by_its_chance():
    technique, module = StochasticDepth(last=0.4), toy(dropout=0.0)
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    x = torch.randn(3, 16, 11)
    plain = [block(x) for block in module.blocks]
    technique.setup(trainer, module, "fit")
    module.eval()
    for block, out, chance in zip(module.blocks, plain, (0.7, 0.4), strict=True):
        torch.testing.assert_close(block(x), x + chance * (out - x))
    module.train()
    assert torch.equal(module.blocks[0](x), plain[0]), "in training it adds all of it"
    technique.teardown(trainer, module, "fit")
    module.eval()
    assert torch.equal(module.blocks[1](x), plain[1])


def test_scaled_in_training_the_model_is_an_ordinary_one_afterwards():
    technique, module = StochasticDepth(last=0.4, scaled="training"), toy(dropout=0.0)
    x = torch.randn(3, 16, 11)
    plain = module.blocks[1](x)
    technique.setup(pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False), module, "fit")
    torch.testing.assert_close(module.blocks[1](x), x + (plain - x) / 0.4)
    module.eval()
    assert torch.equal(module.blocks[1](x), plain)


# -- what blocks return ------------------------------------------------------------------------------------------------
class Tupled(nn.Module):
    """Returns (hidden, None), as layers of older transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return x + self.norm(self.inside(x)), None


class Model(pl.LightningModule):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


def skipping(module: nn.Module) -> StochasticDepth:
    technique = StochasticDepth(last=0.5)
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    technique.setup(trainer, module, "fit")  # type: ignore[arg-type]
    technique._skipped = frozenset(range(len(blocks(module))))
    return technique


def test_what_is_returned_around_the_hidden_state_stays():
    module = Model([Tupled(), Tupled()])
    skipping(module)
    x = torch.randn(5, 4, requires_grad=True)
    mean, drawn = module.layers[0].norm.running_mean.clone(), torch.get_rng_state()
    hidden, other = module.layers[0](x)
    assert torch.equal(hidden, x) and other is None
    assert torch.equal(module.layers[0].norm.running_mean, mean) and torch.equal(torch.get_rng_state(), drawn)
    hidden.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.layers[0].parameters())


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(4, 8)

    def forward(self, x):
        return self.inside(x)


def test_a_block_that_changes_shapes_always_computes_and_all_of_them_are_refused():
    module = Model([Wider(), Wider()])
    skipping(module)
    x = torch.randn(5, 4)
    assert module.layers[0](x).shape == (5, 8)
    with pytest.raises(IncompatibleTechniques, match="no Wider returns a hidden state of its input's shape"):
        module.layers[1](x)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(IncompatibleTechniques, match="finds no repeated blocks in Model"):
        skipping(Model([nn.Linear(2, 2)]))


def language_models():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    llama = LlamaConfig(vocab_size=20, max_position_embeddings=32, **sizes)
    bert = BertConfig(vocab_size=20, max_position_embeddings=32, hidden_dropout_prob=0.0, **sizes)
    return {"llama": AutoModelForCausalLM.from_config(llama), "bert": BertModel(bert)}


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_layers_of_transformers_are_skipped(name):
    """With all of them skipped the model's last norm, if it has one, sees what the embeddings gave."""
    model = language_models()[name].train()
    body = getattr(model, "model", model)
    ids = torch.randint(0, 20, (2, 7))
    technique = skipping(model)
    computed = body.eval()(input_ids=ids).last_hidden_state
    out = body.train()(input_ids=ids).last_hidden_state
    entered = body.norm(body.embed_tokens(ids)) if name == "llama" else body.embeddings(ids)
    assert torch.equal(out, entered)
    assert not torch.equal(out, computed)
    out.sum().backward()
    assert all(not p.grad.any() for p in body.get_submodule(LAYERS[name]).parameters())
    technique.teardown(None, model, "fit")
    assert type(body.get_submodule(LAYERS[name])[0]).__name__.endswith("Layer")


LAYERS = {"llama": "layers", "bert": "encoder.layer"}


# -- ranks -------------------------------------------------------------------------------------------------------------
def rank(folder) -> None:
    warnings.simplefilter("ignore")
    results = {}
    for strategy in ("ddp", "zero2", "zero3"):
        look = Look()
        _, trainer = fit(
            folder / strategy, StochasticDepth(last=0.4), callbacks=[look], world=2, strategy=strategy, dropout=0.0
        )
        results[strategy] = {"gradients": look.gradients, "computed": [sorted(blocks) for blocks in look.computed]}
        results[strategy]["flops"] = trainer.summary["flops_counted"]
    (folder / f"rank-{torch.distributed.get_rank()}.json").write_text(json.dumps(results))


def test_all_ranks_skip_the_same_blocks_and_none_of_them_has_a_gradient(tmp_path):
    """Under ZeRO-3 too, whose buffers would keep the gradient of the last step in which a block computed."""
    succeed(rank, tmp_path, world=2, folder=tmp_path)
    one, other = (json.loads((tmp_path / f"rank-{number}.json").read_text()) for number in range(2))
    for strategy, report in one.items():
        assert report["computed"] == other[strategy]["computed"] == one["ddp"]["computed"]
        assert report["gradients"] and not any(report["gradients"] + other[strategy]["gradients"]), strategy
    assert one["zero2"]["flops"] == one["ddp"]["flops"]
