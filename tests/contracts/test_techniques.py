"""What every registered technique must keep, checked in one process. A new technique is covered by being registered."""

import random
from itertools import combinations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from toy import ACCUMULATE, STEPS, Explode, Exploded, fingerprint, held_out, loader, toy

from shoestring.callbacks.catalog.compose import compose
from shoestring.callbacks.catalog.registry import make, names, technique_class
from shoestring.callbacks.contract import PARTS, SAVINGS, IncompatibleTechniques, Settings, Technique
from shoestring.callbacks.parameters.accessor import shards_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
SKIPPING = [name for name in names() if "skip" in technique_class(name).example().settings()]
FACTS = {"cpu", "bf16", "single", "adamw"}
TRACED = ("samples", "batch", "numerics", "lr", "activations")  # parts whose every change a `Trace` sees


@pytest.fixture(params=names())
def cls(request):
    return technique_class(request.param)


class Trace(pl.Callback):
    """What a run did, part by part, as seen from outside of every technique."""

    def __init__(self):
        self.parts = {part: [] for part in TRACED}
        self.losses = []

    def setup(self, trainer, pl_module, stage):
        plain, saved = pl_module.training_step, self.parts["activations"]
        self.training = False

        def measured(batch, batch_idx):
            if not self.training:  # some look at the module before
                return plain(batch, batch_idx)
            kept = {}

            def pack(tensor):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = plain(batch, batch_idx)
            saved.append(sum(kept.values()))
            return loss

        pl_module.training_step = measured
        self.head, self.bits = None, 32

    def computed_with(self, head, inputs, output):
        """How many bits are enough for the weights a layer really uses: 32 but for those on a grid."""
        if not isinstance(head, torch.nn.Linear):  # cut into factors
            return
        rows = head.weight.detach() / head.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-9)
        levels = [rows * (2 ** (bits - 1) - 1) for bits in range(2, 9)]
        on_grid = [bits for bits, at in enumerate(levels, 2) if (at - at.round()).abs().max() < 1e-3]
        self.bits = min(on_grid, default=32)

    def on_train_start(self, trainer, pl_module):
        self.training = True
        self.head = pl_module.head.register_forward_hook(self.computed_with, prepend=True)

    def teardown(self, trainer, pl_module, stage):
        if self.head is not None:
            self.head.remove()
        del pl_module.training_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.parts["samples"].append(batch["index"].tolist())
        self.parts["batch"].append(tuple(batch["input_ids"].shape))
        self.parts["numerics"].append((pl_module.logits.dtype, self.bits))
        keys = ("lr", "betas", "eps", "weight_decay")
        self.parts["lr"] += [[group[key] for key in keys] for group in trainer.optimizers[0].param_groups]


def trainer_with(*techniques, callbacks=(), steps=STEPS, **options):
    """A plain `pl.Trainer`, made as its user would make it."""
    settings = Settings(accumulate_grad_batches=ACCUMULATE)
    for technique in techniques:
        settings = technique.edit(settings)
    options = {"enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, precision=settings.precision,
        accumulate_grad_batches=settings.accumulate_grad_batches, callbacks=[*callbacks, *techniques],
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


def fit(*techniques, data=None, module=None, ckpt_path=None, **options):
    """Train the toy; returns (module, trainer)."""
    module = toy() if module is None else module
    trainer = trainer_with(*techniques, **options)
    torch.manual_seed(3)
    data = data or loader(generator=torch.Generator().manual_seed(5))  # what draws less must not change the order
    trainer.fit(module, data, held_out(), ckpt_path=ckpt_path, weights_only=True)
    return module, trainer


@pytest.fixture(scope="module")
def absent():
    """The run without any technique: (fingerprint of its final weights, its trace)."""
    trace = Trace()
    module, _ = fit(callbacks=[trace])
    return fingerprint(module.state_dict()), trace


@pytest.fixture(scope="module")
def acting():
    """technique name -> (fingerprint, trace, the technique) of a run with its example; trained once each."""
    runs = {}

    def run(cls):
        if cls.card.name not in runs:
            technique, trace = cls.example(), Trace()
            module, _ = fit(technique, callbacks=[trace])
            runs[cls.card.name] = fingerprint(module.state_dict()), trace, technique
        return runs[cls.card.name]

    return run


# -- the card and the constructor --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", names())
def test_card_is_the_registered_one(name):
    card = technique_class(name).card
    assert card.name == name
    assert card.does and card.does[-1] != "."
    assert card.writes and card.writes <= PARTS and card.reads <= PARTS
    assert card.saves and card.saves <= SAVINGS
    assert card.keeps in ("bits", "result", "quality")
    assert len(card.paper) == 10 and card.paper[4] == "." and card.paper.replace(".", "").isdigit()


def test_names_are_unique():
    assert len({technique_class(name).card.name for name in names()}) == len(names())


def test_constructor_only_stores(cls):
    for made in (cls(), cls.example(), cls.noop(), make(cls.card.name)):
        made.check()
        assert vars(made) == made.settings(), "something was computed or renamed before the run"
        again = eval(repr(made), {cls.__name__: cls})
        assert again.settings() == made.settings() and repr(again) == repr(made)
        assert again != made and hash(again) != hash(made), "Lightning tells callbacks apart by identity: eq=False"
        assert cls(**made.settings()).settings() == made.settings()


def test_edit_is_pure_and_idempotent(cls):
    technique, settings = cls.example(), Settings(accumulate_grad_batches=3, strategy_options={"a": 1})
    once = technique.edit(settings)
    assert settings == Settings(accumulate_grad_batches=3, strategy_options={"a": 1})
    assert technique.edit(settings) == once == technique.edit(once)
    assert technique.settings() == cls.example().settings()
    assert cls.noop().edit(settings) == settings


def test_a_trainer_made_without_its_settings_is_refused(cls):
    """What acts through `edit` would otherwise do nothing in `pl.Trainer(callbacks=[...])`, and say nothing."""
    if cls.example().edit(Settings()) == Settings():
        return
    trainer = trainer_with(callbacks=[cls.example()])
    with pytest.raises(IncompatibleTechniques, match=cls.__name__):
        trainer.fit(toy(), loader(), held_out())


# -- what it does ------------------------------------------------------------------------------------------------------
def test_strength_zero_equals_absence(cls, absent):
    trace = Trace()
    module, _ = fit(cls.noop(), callbacks=[trace])
    assert trace.losses == absent[1].losses
    assert fingerprint(module.state_dict()) == absent[0]
    assert trace.parts == absent[1].parts


def test_example_acts(cls, absent, acting):
    weights, trace, _ = acting(cls)
    seen = {part for part in TRACED if trace.parts[part] != absent[1].parts[part]}
    if cls.card.keeps == "bits":
        assert weights == absent[0]
        assert seen, "the weights are the same, and nothing else shows that it acted"
    else:
        assert weights != absent[0]
    assert set(TRACED) & cls.card.writes <= seen, "the card claims parts that it leaves alone"


def test_card_names_every_part_it_changes(cls, absent, acting):
    """Only what follows from a part that is on the card may change besides."""
    trace = acting(cls)[1].parts
    follow = {"activations": {"batch", "numerics", "modules", "tokens", "depth"}}  # bytes kept follow what is computed
    for part in TRACED:
        if not cls.card.writes & {part, *follow.get(part, ())}:
            assert trace[part] == absent[1].parts[part], f"{part} changes and is not among writes={cls.card.writes}"


def test_checkpointing_keeps_fewer_bytes(absent, acting):
    trace = acting(technique_class("gradient_checkpointing"))[1].parts["activations"]
    assert max(trace) < 0.5 * min(absent[1].parts["activations"])


def test_state_survives_disk(cls, acting, tmp_path):
    technique = acting(cls)[2]
    kept = {"state": technique.state_dict(), "fragments": technique.fragments()}
    torch.save(kept, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    again = cls.example()
    module = toy()
    again.setup(trainer_with(again), module, "fit")
    again.load_state_dict(read["state"])
    again.load_fragments(read["fragments"])
    assert again.state_dict() == kept["state"]
    assert {s: fingerprint(f) for s, f in again.fragments().items()} == {
        s: fingerprint(f) for s, f in kept["fragments"].items()
    }


# -- what it leaves behind ---------------------------------------------------------------------------------------------
def anatomy(module):
    """Classes, attributes and hooks of a module and everything in it."""
    hooks = [key for key in vars(torch.nn.Module()) if key.endswith("_hooks")]
    parts = {}
    for name, part in module.named_modules():
        parts[name] = type(part), sorted(vars(part)) if name else None, [len(getattr(part, h)) for h in hooks]
        assert "forward" not in vars(part) and "__call__" not in vars(part)
    for name, p in module.named_parameters():
        parts[f"{name} itself"] = type(p), p.requires_grad, p.dtype, len(p._backward_hooks or ())
    return parts


def test_teardown_leaves_the_module_as_it_was(cls):
    module = toy()
    before = anatomy(module)
    fit(cls.example(), module=module, steps=2)
    assert anatomy(module) == before


def test_a_crash_leaves_the_module_as_it_was(cls):
    module = toy()
    before = anatomy(module)
    with pytest.raises(Exploded):
        fit(cls.example(), module=module, callbacks=[Explode(1)])
    assert anatomy(module) == before
    fit(cls.example(), module=module, steps=2)  # and the same module trains again


# -- together ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("one", "other"), list(combinations(names(), 2)))
def test_pairs_compose_and_train(one, other):
    pair = [technique_class(name).example() for name in (one, other)]
    try:
        composition = compose(pair, FACTS)
    except IncompatibleTechniques as refusal:
        assert one in str(refusal) and other in str(refusal)
        return
    assert {t.card.name for t in composition.techniques} == {one, other}
    trace = Trace()
    module, trainer = fit(*composition.techniques, callbacks=[trace], steps=4)
    assert trainer.global_step == 4
    assert all(p.isfinite().all() for p in module.parameters())
    assert trace.losses[0] < 10


def together() -> list[Technique]:
    """As many techniques as go together, taken in the registry's order."""
    chosen: list[Technique] = []
    for name in names():
        try:
            compose([*chosen, technique_class(name).example()], FACTS)
        except IncompatibleTechniques:
            continue
        chosen.append(technique_class(name).example())
    return chosen


def test_order_does_not_depend_on_the_order_given():
    chosen, shuffled = together(), random.Random(0)
    assert len(chosen) > 5
    orders = set()
    for _ in range(50):
        shuffled.shuffle(chosen)
        orders.add(tuple(t.card.name for t in compose(chosen, FACTS).techniques))
    assert len(orders) == 1


def test_all_of_them_together_train():
    chosen = compose(together(), FACTS).techniques
    module, trainer = fit(*chosen, val_check_interval=4)
    assert trainer.global_step == STEPS
    assert all(p.isfinite().all() for p in module.parameters())


# -- in anybody's trainer ----------------------------------------------------------------------------------------------
def test_lightning_alone_saves_and_resumes_it(cls, tmp_path):
    """`pl.Trainer(callbacks=[technique])`, `ModelCheckpoint`, `ckpt_path`: the same weights as without a break.

    All micro-batches are alike and nothing is random, because Lightning restores neither sample order nor generators.
    """
    alike = {"words": {"distinct": 4, "noise": 0.0}, "shuffle": False}
    whole, trainer = fit(cls.example(), module=toy(dropout=0.0), data=loader(**alike))
    assert trainer.global_step == STEPS

    def keeping(*callbacks):
        keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        return {"callbacks": [keeper, *callbacks], "enable_checkpointing": True, "data": loader(**alike)}

    with pytest.raises(Exploded):
        fit(cls.example(), module=toy(dropout=0.0), **keeping(Explode(7)))
    resumed, technique = toy(dropout=0.0), cls.example()
    _, trainer = fit(technique, module=resumed, ckpt_path=tmp_path / "step=5.ckpt", **keeping())
    assert trainer.global_step == STEPS
    assert fingerprint(resumed.state_dict()) == fingerprint(whole.state_dict())
    for state, named in technique.fragments().items():
        assert named.keys() <= shards_of(trainer, resumed).slices.keys(), state


@pytest.mark.parametrize("name", SKIPPING)
def test_a_pattern_to_skip_that_matches_nothing_is_refused(name):
    technique = technique_class(name).example()
    technique.skip = ["hed.*"]
    with pytest.raises(
        IncompatibleTechniques, match=rf"{name}: skip='hed\.\*' matches no parameter of Toy\. Nearest: head\.\w+"
    ):
        fit(technique)
