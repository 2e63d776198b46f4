"""Learning rates: rules and schedules against numbers worked out by hand, alone and together."""

import math

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import QUIET, Small, loader, rate, train

from shoestring.callbacks import LRScaling, LRSchedule
from shoestring.callbacks.contract import IncompatibleTechniques, Misconfigured
from shoestring.callbacks.optimization.lr_scaling import scaled
from shoestring.callbacks.optimization.lr_schedule import SHAPES, factor
from shoestring.trainer import Budget

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


# -- rules -----------------------------------------------------------------------------------------------------------
def test_the_linear_rule():
    assert scaled({"lr": 0.1, "momentum": 0.9}, 4, "linear") == {"lr": 0.4}
    assert scaled({"lr": 0.1}, 0.5, "linear") == {"lr": 0.05}


def test_the_square_root_rule_with_betas_and_eps():
    adam = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
    larger = scaled(adam, 4, "sqrt")
    assert larger["lr"] == pytest.approx(2e-3)
    assert larger["betas"] == pytest.approx((0.6, 0.96))  # 1 - 4 * 0.1, 1 - 4 * 0.01
    assert larger["eps"] == pytest.approx(5e-9)
    smaller = scaled(adam, 0.25, "sqrt")
    assert (smaller["lr"], smaller["eps"]) == pytest.approx((5e-4, 2e-8))
    assert smaller["betas"] == pytest.approx((0.975, 0.9975))
    with pytest.raises(
        IncompatibleTechniques, match=r"betas \(0\.9, 0\.99\) cannot be scaled to a batch 11 times larger"
    ):
        scaled(adam, 11, "sqrt")


@given(st.floats(0.1, 9.0), st.floats(0.1, 9.0))
def test_the_rules_compose(one, two):
    group = {"lr": 1e-3, "betas": (0.999, 0.9999), "eps": 1e-8}
    for rule in ("linear", "sqrt"):
        twice = scaled({**group, **scaled(group, one, rule)}, two, rule)
        at_once = scaled(group, one * two, rule)
        assert all(twice[key] == pytest.approx(at_once[key]) for key in twice)


# -- schedules -------------------------------------------------------------------------------------------------------
POINTS = {  # progress: 0, 0.25, 0.5, 0.8, 0.9, 1
    "linear": (1, 0.75, 0.5, 0.2, 0.1, 0),
    "cosine": (1, 0.853553, 0.5, 0.095492, 0.024472, 0),  # (1 + cos(pi p)) / 2
    "wsd": (1, 1, 1, 1, 0.5, 0),
    "rex": (1, 0.857143, 0.666667, 0.333333, 0.181818, 0),  # (1 - p) / (1 - p / 2)
    "constant": (1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_at_hand_computed_points(shape):
    progress = (0, 0.25, 0.5, 0.8, 0.9, 1)
    assert [factor(shape, p, 1.0) for p in progress] == pytest.approx(POINTS[shape], abs=1e-6)
    floored = [0.1 + 0.9 * value for value in POINTS[shape]]
    assert [factor(shape, p, 1.0, 0.1) for p in progress] == pytest.approx(floored, abs=1e-6)
    assert [factor(shape, p, 0.5) for p in progress] == pytest.approx([v / 2 for v in POINTS[shape]], abs=1e-6)


@given(st.sampled_from(sorted(SHAPES)), st.floats(0, 1.5), st.floats(0, 1.5), st.floats(0, 1))
def test_schedules_never_rise_and_stay_between_floor_and_peak(shape, one, two, floor):
    early, late = sorted((one, two))
    assert 1 >= factor(shape, early, 1, floor) >= factor(shape, late, 1, floor) - 1e-12 >= floor - 1e-9


@pytest.mark.parametrize(
    ("technique", "named"),
    [
        (LRSchedule(shape="linaer"), "lr_schedule: shape='linaer'"),
        (LRSchedule(floor=1.5), "lr_schedule: floor=1.5"),
        (LRScaling(rule="cube"), "lr_scaling: rule='cube'"),
        (LRScaling(base_batch=0), "lr_scaling: base_batch=0"),
    ],
)
def test_settings_out_of_range_are_named(technique, named):
    with pytest.raises(Misconfigured, match=named):
        technique.check()


# -- in runs ---------------------------------------------------------------------------------------------------------
class Rates(pl.Callback):
    """The rate (and betas) that each optimizer step has used."""

    def __init__(self):
        self.rates, self.betas = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.betas.append(optimizer.param_groups[0].get("betas"))


def rates(folder, *techniques, steps=10, lr=0.1, module=None, **options):
    seen = Rates()
    trainer = train(
        folder, Budget(steps=steps), module=module or Small(lr=lr), techniques=techniques, callbacks=[seen], **options
    )
    return seen.rates, trainer, seen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_takes_the_rate_of_its_middle_and_the_end_is_the_floor(tmp_path, accumulate):
    lrs, trainer, _ = rates(tmp_path, LRSchedule(floor=0.2), accumulate_grad_batches=accumulate)
    assert lrs == pytest.approx([0.1 * (0.2 + 0.8 * (1 - (s + 0.5) / 10)) for s in range(10)])
    assert rate(trainer) == pytest.approx(0.02)


def test_warmup_rises_to_the_schedule(tmp_path):
    lrs, trainer, _ = rates(tmp_path, LRSchedule(shape="wsd", warmup="4 steps"))
    warm = [0.1 * (s + 0.5) / 4 for s in range(4)]
    assert lrs == pytest.approx([*warm, *[0.1] * 4, 0.1 * 0.15 / 0.2, 0.1 * 0.05 / 0.2])
    assert rate(trainer) == 0.0


def test_a_constant_schedule_with_warmup_stays_at_the_peak(tmp_path):
    lrs, trainer, _ = rates(tmp_path, LRSchedule(shape="constant", warmup="20%"))
    assert lrs == pytest.approx([0.025, 0.075, *[0.1] * 8]) and rate(trainer) == pytest.approx(0.1)


def test_a_budget_brings_its_own_schedule_and_a_given_one_replaces_it(tmp_path):
    lrs, trainer, _ = rates(tmp_path / "a")
    assert lrs == pytest.approx([0.1 * (1 - (s + 0.5) / 10) for s in range(10)]) and rate(trainer) == 0.0
    assert rates(tmp_path / "b", LRSchedule(shape="cosine"))[0][0] == pytest.approx(
        0.05 * (1 + math.cos(math.pi * 0.05))
    )


def test_scaling_for_the_global_batch_once_even_if_resumed(tmp_path):
    """Sixteen samples a step, tuned at four: sqrt(4) times the rate, and betas stretched."""
    techniques = lambda: (LRScaling(base_batch=4), LRSchedule(shape="constant"))  # noqa: E731
    options = {"data": loader(), "accumulate_grad_batches": 4}

    class Crash(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 6:
                raise RuntimeError("crashed")

    lrs, _, seen = rates(tmp_path / "whole", *techniques(), **options)
    assert lrs == pytest.approx([0.2] * 10)
    assert seen.betas[0] == pytest.approx((0.6, 0.996))  # of 0.9, 0.999
    with pytest.raises(RuntimeError):
        train(
            tmp_path / "run", Budget(steps=10), module=Small(lr=0.1), techniques=techniques(), callbacks=[Crash()],
            checkpoint_every="4 steps", **options,
        )  # fmt: skip
    lrs, trainer, seen = rates(tmp_path / "run", *techniques(), **options)
    assert trainer.monitor.resumed_from == 4
    assert lrs == pytest.approx([0.2] * 6) and seen.betas[0] == pytest.approx((0.6, 0.996))


class Momentum(Small):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def test_sgd_takes_the_linear_rule(tmp_path):
    lrs, _, _ = rates(tmp_path, LRScaling(base_batch=8), LRSchedule(shape="constant"), module=Momentum(lr=0.1))
    assert lrs == pytest.approx([0.05] * 10)


def test_scaling_warms_up_from_the_unscaled_rate_and_the_schedule_decays_both(tmp_path):
    """Peak 0.2 = sqrt(16 / 4) * 0.1: the factor rises from 1 to 2 in half the run, the schedule falls in all of it."""
    lrs, trainer, _ = rates(tmp_path, LRSchedule(), LRScaling(base_batch=4, warmup="50%"), accumulate_grad_batches=4)
    middle = [(s + 0.5) / 10 for s in range(10)]
    assert lrs == pytest.approx([0.1 * (1 + min(1, p / 0.5)) * (1 - p) for p in middle])
    assert rate(trainer) == 0.0
    assert [t.card.name for t in trainer.composition.techniques] == ["lr_scaling", "lr_schedule"]


def test_scaling_warms_up_alone_and_beside_a_scheduler_of_the_module(tmp_path):
    class Halving(Small):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    warm = [1 + min(1, (s + 0.5) / 4) for s in range(8)]
    options = {"max_steps": 8, "accumulate_grad_batches": 4}
    for module, plain in ((Small(lr=0.1), [0.1] * 8), (Halving(lr=0.1), [0.1 * 0.5**s for s in range(8)])):
        seen = Rates()
        folder = tmp_path / type(module).__name__
        technique = LRScaling(base_batch=4, warmup="4 steps")
        train(folder, module=module, techniques=[technique], callbacks=[seen], **options)
        assert seen.rates == pytest.approx([a * b for a, b in zip(plain, warm, strict=True)])


@pytest.mark.parametrize("kind", ["onecycle", "sequential", "cosine", "step"])
def test_schedulers_of_the_module_keep_the_scaled_rate(tmp_path, kind):
    class Own(Small):
        def configure_optimizers(self):
            optimizer, torch_lr = super().configure_optimizers(), torch.optim.lr_scheduler
            made = {
                "onecycle": lambda: torch_lr.OneCycleLR(optimizer, max_lr=self.lr, total_steps=9, cycle_momentum=False),
                "cosine": lambda: torch_lr.CosineAnnealingLR(optimizer, 8),
                "step": lambda: torch_lr.StepLR(optimizer, 3),
                "sequential": lambda: torch_lr.SequentialLR(
                    optimizer, [torch_lr.ConstantLR(optimizer, 0.5, 3), torch_lr.ExponentialLR(optimizer, 0.5)], [4]
                ),
            }
            return [optimizer], [{"scheduler": made[kind](), "interval": "step"}]

    options = {"max_steps": 8, "accumulate_grad_batches": 4}
    plain, scaled_up = Rates(), Rates()
    train(tmp_path / "a", module=Own(lr=0.1), callbacks=[plain], **options)
    train(tmp_path / "b", module=Own(lr=0.1), techniques=[LRScaling(base_batch=4)], callbacks=[scaled_up], **options)
    assert scaled_up.rates == pytest.approx([2 * lr for lr in plain.rates])
    assert len(set(plain.rates)) > 2
