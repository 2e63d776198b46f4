"""What techniques do around a module's own step: choose its samples, weigh them, and leave nothing behind."""

from __future__ import annotations

from collections import namedtuple
from contextlib import nullcontext

import pytest
import pytorch_lightning as pl
import torch
from torch.nn.functional import cross_entropy
from toy import GLOBAL_BATCH, LENGTH, STEPS, Toy, held_out, loader, toy
from transformers import AutoModelForCausalLM, LlamaConfig

from shoestring.callbacks import Accountant, Card, Technique
from shoestring.callbacks.forward.training_step import (
    CannotChoose,
    Chosen,
    NoLoss,
    add_auxiliary_loss,
    choose_samples,
    remove_from_step,
    select,
    wrapped_step,
)
from shoestring.trainer import Trainer
from shoestring.trainer.tasks.classify import Classifier
from shoestring.trainer.tasks.language import CausalLM
from shoestring.trainer.tasks.problems import SingleLabel

pytestmark = pytest.mark.filterwarnings("ignore")


class Keep(Technique, pl.Callback):
    """Trains on the `count` samples of each micro-batch that have the largest loss, scored by a forward of its own."""

    card = Card(name="keep", does="keeps some", writes={"samples"})

    def __init__(self, *, count: int = 2, weight: float | None = None) -> None:
        self.count, self.weight = count, weight

    def setup(self, trainer, pl_module, stage) -> None:
        choose_samples(pl_module, self)
        self._module = pl_module
        self.seen: list[list[int]] = []

    def choose(self, step) -> Chosen:
        batch = step.batch
        with torch.no_grad():
            losses = cross_entropy(self._module(batch["input_ids"]), batch["labels"], reduction="none")
        rows = losses.topk(min(self.count, len(losses))).indices
        self.seen.append(batch["index"][rows].tolist())
        return Chosen(rows, None if self.weight is None else torch.full((len(rows),), self.weight))

    def teardown(self, trainer, pl_module, stage) -> None:
        remove_from_step(pl_module, self)


class Trained(pl.Callback):
    """The losses of the module's own step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"]))


def fit(*callbacks, module=None, **options) -> pl.Trainer:
    torch.manual_seed(3)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=list(callbacks),
        **options,
    )  # fmt: skip
    trainer.fit(module or toy(), loader(words={"noise": 0.0}), held_out())
    return trainer


def ours(tmp_path, *techniques, **options) -> Trainer:
    trainer = Trainer(
        techniques=techniques, run_dir=tmp_path, ledger=False, accelerator="cpu", max_steps=STEPS, max_epochs=-1,
        accumulate_grad_batches=2, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(toy(), loader(), held_out())
    return trainer


# -- choosing ----------------------------------------------------------------------------------------------------------
def test_only_what_is_chosen_is_trained_on():
    seen: list[int] = []

    class Sizes(Toy):
        def training_step(self, batch, batch_idx):
            seen.append(len(batch["labels"]))
            return super().training_step(batch, batch_idx)

    torch.manual_seed(7)
    module = Sizes()
    fit(Keep(count=3), module=module)
    assert seen == [3] * STEPS
    assert "training_step" not in vars(module), "the module is as it was"


def test_all_of_them_is_as_without_a_choice():
    plain, whole = Trained(), Trained()
    fit(plain)
    fit(Keep(count=4), whole)
    assert len(plain.losses) == STEPS
    # rows come in another order, and so do the draws of dropout
    fit(still := Trained(), module=toy(dropout=0.0))
    fit(Keep(count=4), kept := Trained(), module=toy(dropout=0.0))
    assert kept.losses == pytest.approx(still.losses, abs=1e-6)


def test_what_is_dropped_is_not_counted_and_what_scores_is(tmp_path):
    """Samples and FLOPs, in our trainer and in a plain one with an accountant."""
    absent, kept = ours(tmp_path / "absent").summary, ours(tmp_path / "kept", Keep(count=1)).summary
    assert absent["samples"] == STEPS * GLOBAL_BATCH
    assert kept["samples"] == STEPS * 2 and kept["tokens"] * 4 == absent["tokens"]
    # a forward on four, and forward and backward, three times as much, on one of them; the first layer needs no
    # gradient of its input, so a little less
    assert kept["flops_counted"] / absent["flops_counted"] == pytest.approx(1 / 3 + 1 / 4, abs=0.03)
    accountant = Accountant()
    fit(Keep(count=1), accountant, accumulate_grad_batches=2)
    assert accountant.clock.spend.samples == STEPS * 2
    assert accountant.clock.spend.flops_counted == pytest.approx(kept["flops_counted"])


def test_scoring_is_counted_again_where_its_shape_is_new(tmp_path):
    """How many are kept differs from step to step; each kind of step is watched once."""

    class Varying(Keep):
        def choose(self, step):
            self.count = 1 + len(self.seen) % 3
            return super().choose(step)

    varying = ours(tmp_path / "varying", Varying()).summary
    each = [ours(tmp_path / str(count), Keep(count=count)).summary for count in (1, 2, 3)]
    assert varying["samples"] == STEPS * 2 * 2
    assert varying["flops_counted"] == pytest.approx(sum(run["flops_counted"] for run in each) / 3)


# -- weights -----------------------------------------------------------------------------------------------------------
class Weighing(Toy):
    def training_step(self, batch, batch_idx):
        losses = cross_entropy(self(batch["input_ids"]), batch["labels"], reduction="none")
        return (losses * batch.get("sample_weights", 1.0)).mean()


def test_weights_reach_the_loss():
    def losses(technique):
        torch.manual_seed(7)
        fit(technique, trained := Trained(), module=Weighing(dropout=0.0, lr=0.0))
        return trained.losses

    assert losses(Keep(count=4, weight=0.5)) == pytest.approx([0.5 * loss for loss in losses(Keep(count=4))])


def test_weights_that_nobody_reads_are_refused():
    with pytest.raises(CannotChoose, match="has not read the batch's 'sample_weights'"):
        fit(Keep(count=2, weight=2.0))


def test_the_share_of_the_global_mean_follows_the_targets():
    """Padded text: 6 of 10 targets are left in 2 of 4 rows; the global mean of what is left has this share of them."""
    labels = torch.tensor([[1, 2, -100], [3, 4, 5], [6, 7, 8], [9, 9, -100]])
    batch = {"labels": labels, "loss_weight": torch.tensor(1.5)}
    cut = select(batch, Chosen(torch.tensor([1, 2])))
    assert cut["loss_weight"] == pytest.approx(1.5 * 6 / 10 * 4 / 2)
    assert batch["loss_weight"] == 1.5, "the loader's batch is not changed"


# -- any batch ---------------------------------------------------------------------------------------------------------
Pair = namedtuple("Pair", "x y")
X = torch.arange(8.0).view(4, 2)


@pytest.mark.parametrize(
    ("batch", "cut"),
    [
        (X, X[[2, 0]]),
        ((X, X[:, 0]), (X[[2, 0]], X[[2, 0], 0])),
        ([X, X[:, 0]], [X[[2, 0]], X[[2, 0], 0]]),
        (Pair(X, 3), Pair(X[[2, 0]], 3)),
        ({"x": X, "names": ["a", "b", "c", "d"], "scale": torch.tensor(2.0), "mask": torch.ones(7, 2)},
         {"x": X[[2, 0]], "names": ["c", "a"], "scale": torch.tensor(2.0), "mask": torch.ones(7, 2)}),
        ({"in": {"x": X}, "more": (X, "text")}, {"in": {"x": X[[2, 0]]}, "more": (X[[2, 0]], "text")}),
    ],
)  # fmt: skip
def test_rows_of_any_batch(batch, cut):
    assert repr(select(batch, Chosen(torch.tensor([2, 0])))) == repr(cut)
    assert type(select(batch, Chosen(torch.tensor([2, 0])))) is type(batch)


def test_a_batch_without_samples_is_refused():
    with pytest.raises(CannotChoose, match="a str has no samples"):
        select("text", Chosen(torch.tensor([0])))
    with pytest.raises(CannotChoose, match="need batches that are mappings"):
        select(X, Chosen(torch.tensor([0]), torch.ones(1)))


# -- together ----------------------------------------------------------------------------------------------------------
class Double:
    """A term that doubles the loss, and remembers what it was computed on."""

    def capture(self):
        return nullcontext()

    def compute(self, watched, loss, step):
        self.batch = step.batch
        return step.again().detach() * 0 + loss


class First:
    def choose(self, step):
        return Chosen(torch.arange(len(step.batch["labels"]) - 1))


def test_choosers_and_terms_share_one_wrapper_and_leave_in_any_order():
    module = toy(dropout=0.0)
    plain = module.training_step
    batch = {"input_ids": torch.ones(4, LENGTH, dtype=torch.int64), "labels": torch.zeros(4, dtype=torch.int64)}
    one, two, double = First(), First(), Double()
    for chooser in (one, two):
        choose_samples(module, chooser)
    add_auxiliary_loss(module, double)
    loss = module.training_step(batch, 0)
    assert len(double.batch["labels"]) == 2, "one after another, and terms see what is left"
    assert float(loss) == pytest.approx(2 * float(plain({key: value[:2] for key, value in batch.items()}, 0)))
    for part in (two, double, one):
        assert wrapped_step(module) is not None
        remove_from_step(module, part)
        remove_from_step(module, part)
    assert wrapped_step(module) is None and module.training_step == plain


def test_a_module_that_optimizes_by_hand_has_no_loss_to_add_to():
    module = toy()
    module.automatic_optimization = False
    with pytest.raises(NoLoss, match="Toy optimizes manually"):
        add_auxiliary_loss(module, Double())


# -- the tasks' own modules --------------------------------------------------------------------------------------------
def small_llama() -> CausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    return CausalLM(AutoModelForCausalLM.from_config(config), None)


def text() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[1, 4:] = -100  # as padding
    return {"input_ids": ids, "labels": labels}


def test_weighted_sequences_are_weighted_by_token():
    """sum of w_i l_it over the number of targets; with weights of 1 it is the model's own loss."""
    module, batch = small_llama(), text()
    plain = module.training_step(batch, 0)
    one = module.training_step({**batch, "sample_weights": torch.ones(3)}, 0)
    torch.testing.assert_close(one, plain)
    alone = [module.training_step({k: v[i : i + 1] for k, v in batch.items()}, 0) for i in range(3)]
    targets, weights = torch.tensor([6.0, 3.0, 6.0]), torch.tensor([0.5, 2.0, 0.0])
    expected = (torch.stack(alone) * targets * weights).sum() / targets.sum()
    torch.testing.assert_close(module.training_step({**batch, "sample_weights": weights}, 0), expected)


def test_weighted_samples_of_a_classifier():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    module = Classifier(_Named(net), None, SingleLabel(["a", "b", "c"]))
    batch = {"x": torch.randn(5, 4), "labels": torch.tensor([0, 1, 2, 0, 1])}
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0])
    expected = (cross_entropy(net(batch["x"]), batch["labels"], reduction="none") * weights).mean()
    torch.testing.assert_close(module.training_step({**batch, "sample_weights": weights}, 0), expected)


class _Named(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)
