"""Distillation in real fits: which teachers, which modules, which positions, and what stays of it."""

import math

import pytest
import pytorch_lightning as pl
import torch
from fits import Language, fit, llama
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from toy import WIDTH, Block, Toy, fingerprint, held_out, loader, toy

from shoestring.callbacks import Distillation
from shoestring.callbacks.compression.distillation_losses import kd_loss
from shoestring.callbacks.compression.teachers import NoTeacher, frozen_copy
from shoestring.callbacks.contract import Misconfigured
from shoestring.callbacks.forward.model_calls import NoLogits
from shoestring.callbacks.forward.training_step import NoLoss

pytestmark = pytest.mark.filterwarnings("ignore")


class Fixed(nn.Module):
    """A teacher that always says the same, and never trains."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.drop = nn.Dropout(0.5)

    def forward(self, ids):
        return self.drop(self.logits).expand(len(ids), -1)


# -- the loss ----------------------------------------------------------------------------------------------------------
def test_the_loss_is_the_tasks_and_the_teachers():
    said = [3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    teacher = Fixed(said)
    fixed = list(loader(shuffle=False, words={"noise": 0.0}))
    for labels in (1.0, 0.25):
        module = toy(dropout=0.0)
        logits = module(fixed[0]["input_ids"]).detach()
        wanted = labels * cross_entropy(logits, fixed[0]["labels"])
        wanted = wanted + 0.7 * kd_loss(logits, torch.tensor(said).expand(4, -1), 3.0)
        technique = Distillation(teacher=teacher, weight=0.7, labels=labels, temperature=3.0, teacher_dtype="float32")
        losses = fit(module, technique, data=DataLoader(fixed, batch_size=None))
        assert losses[0] == pytest.approx(wanted.item(), rel=1e-6)
    assert teacher.training and teacher.logits.requires_grad, "the user's own module is as it was"


def test_a_student_becomes_its_teacher():
    teacher = toy(dropout=0.0)
    torch.manual_seed(1)
    student = Toy(dropout=0.0)
    ids = next(iter(held_out()))["input_ids"]
    before = kd_loss(student(ids), teacher(ids)).item()
    fit(student, Distillation(teacher=teacher, labels=0.0, temperature=1.0, teacher_dtype="float32"), steps=120)
    assert kd_loss(student(ids), teacher(ids)).item() < 0.1 * before


def test_initial_is_the_student_as_it_was():
    """Before the first step they agree, so the term is 0; later the teacher is still the same."""
    module, technique = toy(dropout=0.0), Distillation(weight=100.0, teacher_dtype="float32")
    start = fingerprint(dict(module.named_parameters()))
    kept = {}

    class Keep(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            teacher = technique._teacher.module
            kept.update(teacher=fingerprint(dict(teacher.named_parameters())), training=teacher.training)
            kept["shared"] = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in module.parameters()}
            kept["grads"] = any(p.requires_grad for p in teacher.parameters())
            kept["state"] = set(trainer.strategy.lightning_module_state_dict()) == set(toy().state_dict())

    with_it = fit(module, technique, Keep(), steps=4)
    without = fit(toy(dropout=0.0), steps=4)
    assert with_it[0] == pytest.approx(without[0], abs=1e-5) and with_it[-1] > without[-1]
    assert kept == {"teacher": start, "training": False, "shared": set(), "grads": False, "state": True}
    assert fingerprint(dict(module.named_parameters())) != start


def test_low_precision_teachers_are_about_the_same():
    def run(dtype):
        torch.manual_seed(1)
        return fit(Toy(dropout=0.0), Distillation(teacher=toy(), teacher_dtype=dtype), steps=6)

    whole, half = run("float32"), run("bfloat16")
    assert half != whole and half == pytest.approx(whole, rel=0.02)


def test_a_copy_leaves_rotary_frequencies_and_other_peoples_hooks_alone():
    module = nn.Linear(2, 2)
    module.register_buffer("frequencies", torch.full((1,), 1 / 3), persistent=False)
    module.register_buffer("mean", torch.full((1,), 1 / 3))
    module.register_forward_hook(lambda *_: None)
    taught = frozen_copy(module, torch.bfloat16, apart=False)
    assert (taught.weight.dtype, taught.mean.dtype) == (torch.bfloat16, torch.bfloat16)
    assert taught.frequencies.dtype == torch.float32
    assert len(taught._forward_hooks) == len(module._forward_hooks) == 1
    assert frozen_copy(module, torch.float32, apart=False).weight.data_ptr() == module.weight.data_ptr()


# -- modules of all kinds ----------------------------------------------------------------------------------------------
class Named(Toy):
    """Its layers are in a submodule, and its `forward` is never called."""

    def __init__(self, where):
        pl.LightningModule.__init__(self)
        self.lr, self.optimizer, self.where = 1e-2, "adamw", where
        inner = nn.Sequential(nn.Embedding(29, WIDTH), Block(0.0), nn.Flatten(), nn.Linear(16 * WIDTH, 7))
        setattr(self, where, inner)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch, batch_idx):
        return {"loss": cross_entropy(getattr(self, self.where)(batch["input_ids"]), batch["labels"]), "more": 1}


class Bare(Named):
    """As a module of anybody's that leaves Lightning's forward alone."""

    forward = pl.LightningModule.forward


@pytest.mark.parametrize(("module", "of"), [(Named("model"), ""), (Bare("net"), ""), (Named("net"), "net")], ids=str)
def test_logits_are_located_in_anybodys_module(module, of):
    losses = fit(module, Distillation(teacher=Fixed([9.0] + [0.0] * 6), weight=1.0, of=of, teacher_dtype="float32"))
    plain = fit(Named(module.where))
    assert losses[0] > plain[0] + 0.5


def test_what_is_missing_is_one_clear_error():
    with pytest.raises(NoLogits, match="'forward' was not called in training_step; set `of`"):
        fit(Named("net"), Distillation())
    with pytest.raises(NoLogits, match="of='nett' is no submodule; there are net"):
        fit(Named("net"), Distillation(of="nett"))
    two = Bare("net")
    two.other = nn.Linear(2, 2)
    with pytest.raises(NoLogits, match="set `of` to the submodule that returns logits: net, other"):
        fit(two, Distillation())
    with pytest.raises(NoLogits, match=r"the teacher returned a torch.int64 tensor of shape \(4, 16\); logits are"):
        fit(Named("net"), Distillation(of="net.0", teacher=nn.Identity()))
    with pytest.raises(ValueError, match=r"student logits \(4, 7\) and teacher logits \(4, 3\) differ"):
        fit(toy(), Distillation(teacher=Fixed([1.0, 2.0, 3.0])))
    with pytest.raises(NoTeacher, match=r"\./nowhere' has no config.json"):
        fit(toy(), Distillation(teacher="./nowhere"))


def test_hand_made_optimization_is_refused():
    module = toy()
    module.automatic_optimization = False
    with pytest.raises(NoLoss, match="Toy optimizes manually"):
        fit(module, Distillation())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight": -1.0}, "weight=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"teacher_dtype": "int8"}, r"teacher_dtype='int8' is not allowed; use float32 \| bfloat16 \| float16"),
        ({"cache": "x", "hidden": 1.0}, "hidden states and attention are not cached"),
        ({"cache": "x", "shard_teacher": True}, "shard_teacher=False"),
        ({"top_k": 0}, "a positive number of classes"),
        ({"teacher": ""}, "initial"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(Misconfigured, match=said):
        Distillation(**settings).check()


# -- sequences of Hugging Face models ----------------------------------------------------------------------------------
def sequences(lengths=(8, 5), weight=None):
    """One batch, over and over."""
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randint(1, 32, (n,), generator=draw) for n in lengths]
    pad = nn.utils.rnn.pad_sequence
    batch = {"input_ids": pad(rows, True, 0), "labels": pad(rows, True, -100)}
    if weight is not None:
        batch["loss_weight"] = torch.tensor(weight)
    return DataLoader([batch] * 8, batch_size=None)


def test_only_tokens_that_predict_one_count(tmp_path):
    """The loss is the mean over 7 + 4 targets, of a teacher read from a folder."""
    teacher = llama(3, 32)
    teacher.save_pretrained(tmp_path)
    student, batch = llama(), next(iter(sequences()))
    with torch.no_grad():
        mine, its = (model.eval()(batch["input_ids"]).logits for model in (student, teacher))
        task = student(**batch).loss
    rows = [(0, t) for t in range(7)] + [(1, t) for t in range(4)]
    wanted = kd_loss(torch.stack([mine[at] for at in rows]), torch.stack([its[at] for at in rows]), 2.0)
    settings = {"teacher": str(tmp_path), "teacher_dtype": "float32"}
    loss = fit(Language(llama()), Distillation(**settings), data=sequences())[0]
    assert loss == pytest.approx((task + wanted).item(), rel=1e-5)
    halved = fit(Language(llama()), Distillation(**settings), data=sequences(weight=0.5))[0]
    assert halved == pytest.approx((task + wanted / 2).item(), rel=1e-5)


def test_hidden_states_of_other_widths_and_attentions_are_matched():
    for settings in ({"hidden": 1.0}, {"attention": 1.0}):
        technique = Distillation(
            teacher=llama(4, 32, "eager"), weight=0.0, labels=0.0, teacher_dtype="float32", **settings
        )
        losses = fit(Language(llama(attention="eager")), technique, data=sequences((8, 8)), steps=8)
        assert all(math.isfinite(x) for x in losses) and 0 < losses[-1] < losses[0]
    with pytest.raises(NoLogits, match="attn_implementation='eager'"):
        fit(Language(llama()), Distillation(teacher=llama(4), attention=1.0), data=sequences())
    with pytest.raises(NoLogits, match="layers has 0: 9; the student has 2 blocks, the teacher 4"):
        fit(Language(llama()), Distillation(teacher=llama(4), hidden=1.0, layers={0: 9}), data=sequences())


def test_resuming_with_another_teacher_is_refused():
    technique = Distillation(teacher_dtype="float32")
    fit(toy(), technique)
    again = Distillation(teacher_dtype="float32")
    state = technique.state_dict()
    module = toy()
    with torch.no_grad():
        module.head.bias += 1

    class Restore(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            again.load_state_dict(state)

    with pytest.raises(NoTeacher, match=r"began with teacher [0-9a-f]{32} and now has"):
        fit(module, Restore(), again)


def test_a_teacher_of_another_vocabulary_is_refused_before_the_first_step(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path)
    student = Language(LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)))
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, callbacks=[Distillation(teacher=str(tmp_path))])
    with pytest.raises(NoTeacher, match=r"the teacher has vocab_size 40 and the student 32"):
        trainer.fit(student, [{"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}])
    assert trainer.global_step == 0
