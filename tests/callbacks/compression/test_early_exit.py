"""Exits after intermediate blocks: what they compute, what training them does, and what leaving early saves."""

from math import log

import pytest
import pytorch_lightning as pl
import torch
import transformers
from fits import Language, fit, llama
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from toy import fingerprint, held_out, loader, toy

from shoestring.callbacks import EarlyExit, GradientCheckpointing
from shoestring.callbacks.compression.early_exit import exit_by_confidence, exit_weights, run_until_sure, sure
from shoestring.callbacks.contract import Misconfigured
from shoestring.callbacks.forward.blocks import blocks, recorded, replayed

pytestmark = pytest.mark.filterwarnings("ignore")


def bert(layers=3):
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(layers)
    return transformers.BertForSequenceClassification(config).eval()


IDS = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(2))


# -- the pure core -----------------------------------------------------------------------------------------------------
def test_deeper_exits_weigh_more():
    assert exit_weights([0, 2], 1.0) == [0.25, 0.75]
    assert exit_weights([0, 1, 2], 0.5) == pytest.approx([0.5 / 6, 1 / 6, 0.25])


def test_sure_by_hand():
    """Probabilities (3/4, 1/4) and (1/2, 1/2): entropies 0.811 and 1 of the largest possible."""
    logits = torch.tensor([[log(3.0), 0.0], [0.0, 0.0]])
    assert sure(logits, 0.74).tolist() == [True, False]
    assert sure(logits, 0.76).tolist() == [False, False]
    assert sure(logits, 0.82, "entropy").tolist() == [True, False]
    assert sure(logits, 0.80, "entropy").tolist() == [False, False]
    with pytest.raises(ValueError, match="'margin' is not among confidence, entropy"):
        sure(logits, 0.5, "margin")


def test_exit_by_confidence_by_hand():
    """Sample 0 is sure at the first exit, sample 1 at the second, sample 2 never: the last answers."""
    logits = torch.tensor([[[9.0, 0], [1, 0], [1, 0]], [[0, 9], [0, 9.0], [0, 1]], [[0, 0], [0, 0], [2.0, 0]]])
    chosen, taken = exit_by_confidence(logits, 0.9)
    assert taken.tolist() == [0, 1, 2]
    assert chosen.tolist() == [[9, 0], [0, 9], [2, 0]]


# -- what an exit computes ---------------------------------------------------------------------------------------------
def test_an_exit_is_the_models_own_head_on_a_blocks_output():
    """Against each architecture's final layers, called by hand."""
    module, causal, classifier = toy().eval(), llama(3).eval(), bert()
    after = {
        module: lambda h: module.head(h.mean(1)),
        causal: lambda h: causal.lm_head(causal.model.norm(h)),
        classifier: lambda h: classifier.classifier(classifier.bert.pooler(h)),
    }
    for model, tail in after.items():
        ids = IDS % 29
        repeated = blocks(model)
        with torch.no_grad(), recorded(repeated) as outputs:
            whole = getattr(out := model(ids), "logits", out)
        for index, output in enumerate(outputs):
            with torch.no_grad(), replayed(repeated, outputs, index):
                logits = getattr(out := model(ids), "logits", out)
            hidden = output[0] if isinstance(output, tuple) else output
            assert torch.allclose(logits, tail(hidden), atol=1e-6), (type(model).__name__, index)
            assert torch.equal(logits, whole) == (index == len(repeated) - 1)


def test_the_added_loss_is_the_weighted_loss_of_the_exits():
    batch = next(iter(held_out()))
    module = toy(dropout=0.0)
    x = module.embed(batch["input_ids"]) + module.positions
    first = module.blocks[0](x)
    losses = [cross_entropy(module.head(h.mean(1)), batch["labels"]) for h in (first, module.blocks[1](first))]
    wanted = losses[1] + 0.4 * losses[0]
    wanted.backward()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}

    class Gradients(pl.Callback):
        seen = {}

        def on_after_backward(self, trainer, pl_module):
            self.seen = self.seen or {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.requires_grad}

    recorder = Gradients()
    data = DataLoader([batch], batch_size=None)
    assert fit(toy(dropout=0.0), EarlyExit(weight=0.4), recorder, data=data, steps=1)[0] == pytest.approx(wanted.item())
    assert recorder.seen.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(recorder.seen[name], gradient, atol=1e-6), name


def test_buffers_and_logs_are_those_of_the_whole_model():
    class Logging(type(toy())):
        calls = []

        def __init__(self):
            super().__init__(dropout=0.0)
            self.norm = nn.BatchNorm1d(7)

        def log(self, name, value, **options):
            self.calls.append((name, float(value)))

        def forward(self, ids):
            return self.norm(super().forward(ids))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("mine", loss)
            return loss

    def run(*techniques):
        torch.manual_seed(7)
        module = Logging()
        module.calls.clear()
        losses = fit(module, *techniques, steps=1)
        return losses, list(module.calls), fingerprint(dict(module.named_buffers())), int(module.seen)

    plain, exiting = run(), run(EarlyExit(weight=0.5))
    assert exiting[0] != plain[0]
    assert exiting[1:] == plain[1:] and exiting[3] == 1


def test_exits_take_turns():
    """Which blocks' outputs reach the final norm: the last's, then those of every second exit in turn."""
    model = llama(5)
    outputs, taken = {}, []
    for index, block in enumerate(blocks(model)):
        block.register_forward_hook(lambda _, args, output, index=index: outputs.update({output.data_ptr(): index}))
    model.model.norm.register_forward_pre_hook(lambda _, args: taken.append(outputs[args[0].data_ptr()]))
    data = DataLoader([{"input_ids": IDS, "labels": IDS}] * 4, batch_size=None)
    fit(Language(model), EarlyExit(weight=1.0, rotate=2), data=data, steps=3)
    assert taken == [4, 0, 2, 4, 1, 3, 4, 0, 2]


def test_recomputed_blocks_train_the_same():
    def run(*techniques):
        module = toy(dropout=0.0)
        losses = fit(module, *techniques, steps=4)
        return losses, fingerprint(module.state_dict())

    assert run(GradientCheckpointing(), EarlyExit()) == run(EarlyExit())


# -- leaving early -----------------------------------------------------------------------------------------------------
def counted(model):
    """How often each block of `model` is computed."""
    counts = [0] * len(blocks(model))

    def count(index):
        def hook(*_):
            counts[index] += 1

        return hook

    for index, block in enumerate(blocks(model)):
        block.register_forward_hook(count(index))
    return counts


@pytest.mark.parametrize("make", [lambda: toy().eval(), lambda: llama(4).eval(), bert])
def test_blocks_behind_the_exit_are_not_computed(make):
    model = make()
    counts, ids = counted(model), IDS % 29
    before = {name: type(part) for name, part in model.named_modules()}
    result = run_until_sure(model, ids, threshold=0.0)
    assert counts == [1] + [0] * (len(counts) - 1)
    assert (result.blocks_run, result.blocks, result.mean_depth) == (1, len(counts), 1.0)
    counts[:] = [0] * len(counts)
    result = run_until_sure(model, ids, threshold=1.1)
    assert counts == [1] * len(counts), "none is computed twice"
    assert result.blocks_run == result.blocks == result.mean_depth
    with torch.no_grad():
        whole = getattr(out := model(ids), "logits", out)
    assert torch.allclose(result.logits, whole if whole.ndim == 2 else whole[:, -1], atol=1e-6)
    assert {name: type(part) for name, part in model.named_modules()} == before


def test_given_exits_and_samples_of_their_own_depth():
    model = bert(4)
    with torch.no_grad():
        repeated = blocks(model)
        with recorded(repeated) as outputs:
            model(IDS)
        exits = []
        for index in (1, 3):
            with replayed(repeated, outputs, index):
                exits.append(model(IDS).logits)
    likeliest = exits[0].softmax(-1).amax(-1)
    threshold = float(likeliest.sort().values[1:3].mean())  # two of four are sure at the first exit
    result = run_until_sure(model, IDS, threshold=threshold, exits=[1])
    wanted, taken = exit_by_confidence(torch.stack(exits), threshold)
    assert torch.allclose(result.logits, wanted, atol=1e-6)
    assert result.depth.tolist() == [2 if t == 0 else 4 for t in taken]
    assert sorted(result.depth.tolist()) == [2, 2, 4, 4] and result.mean_depth == 3.0 and result.blocks_run == 4


def test_trained_exits_answer_well_and_save_blocks():
    """On a task that one block can learn, a trained exit is sure of the right answers where an untrained one is not."""

    def trained(*techniques):
        module = toy(dropout=0.0)
        fit(module, *techniques, steps=150, data=loader(words={"noise": 0.0, "distinct": 8}))
        return module.eval()

    batch = next(iter(loader(words={"noise": 0.0, "distinct": 8}, shuffle=False)))
    with_exits = run_until_sure(trained(EarlyExit(weight=1.0)), batch["input_ids"], threshold=0.9)
    assert (with_exits.logits.argmax(-1) == batch["labels"]).all()
    assert with_exits.mean_depth == 1.0
    plain = trained()
    x = plain.embed(batch["input_ids"]) + plain.positions
    untrained = plain.head(plain.blocks[0](x).mean(1)).softmax(-1).gather(1, batch["labels"][:, None])
    assert untrained.min() < 0.9, "without training, the first exit would not have known"


# -- errors ------------------------------------------------------------------------------------------------------------
def test_bad_input_is_one_clear_error():
    with pytest.raises(Misconfigured, match=r"exits has \[1, 9\]; the model has 2 blocks: use 0 to 0"):
        fit(toy(), EarlyExit(exits=[0, 1, 9]))
    with pytest.raises(Misconfigured, match="rotate=3 is not allowed; use at most 1, the number of exits"):
        fit(toy(), EarlyExit(rotate=3))
    with pytest.raises(Misconfigured, match="finds no repeated blocks in Linear"):
        run_until_sure(nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(Misconfigured, match=r"measure='margin' is not allowed; use confidence \| entropy"):
        run_until_sure(toy(), IDS, measure="margin")
    for settings, said in (({"weight": -1.0}, "weight"), ({"rotate": 0}, "rotate"), ({"exits": []}, "exits")):
        with pytest.raises(Misconfigured, match=f"early_exit: {said}="):
            EarlyExit(**settings).check()
