"""What a trainer is asked for beside a strategy reaches it, or is refused: nothing is ignored."""

from __future__ import annotations

from typing import Any

import pytest
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from shoestring.callbacks import MixedPrecision
from shoestring.strategies import OFFLOADS, Sharding
from shoestring.trainer import Trainer
from shoestring.trainer.run.zero import UnknownStrategy

OURS = f"or name one of {', '.join(OFFLOADS)}"


class Compressed(MixedPrecision):
    """Asks for an option of the strategy."""

    def edit(self, settings: Any) -> Any:
        return settings.replace(strategy_options={"round_robin_gradients": True})


@pytest.fixture
def trainer() -> Any:
    def make(strategy: Any, **options: Any) -> Trainer:
        return Trainer(strategy=strategy, ledger=False, accelerator="cpu", **options)

    return make


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"sharding": Sharding(overlap=True)}, r"sharding=Sharding\(…\)"),
        ({"sharding": Sharding()}, r"sharding=Sharding\(…\)"),
        ({"offload": "optimizer"}, "offload='optimizer'"),
        ({"techniques": [Compressed()]}, "round_robin_gradients=True, of a technique,"),
    ],
)
@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, DDPStrategy, lambda: "fsdp"])
def test_a_strategy_from_elsewhere_has_its_own_settings(strategy: Any, keywords: Any, named: str, trainer: Any) -> None:
    given = strategy()
    kind = repr(given) if isinstance(given, str) else f"a {type(given).__name__} that was made outside"
    said = f"strategy is {kind}, and {named} would do nothing: .* where it is made, {OURS}$"
    with pytest.raises(UnknownStrategy, match=said):
        trainer(given, **keywords)


def test_a_strategy_from_elsewhere_is_taken_as_it_is(trainer: Any) -> None:
    given = SingleDeviceStrategy("cpu")
    assert trainer(given).strategy is given


@pytest.mark.parametrize("strategy", OFFLOADS)
def test_a_setting_that_the_named_strategy_lacks_is_refused(strategy: str, trainer: Any) -> None:
    for setting, value in {"overlap": True, "prefetch": 1000, "allgather_bucket": 1000}.items():
        sharding = Sharding(**{setting: value})  # type: ignore[arg-type]
        if setting in sharding.foreign_to(strategy):
            with pytest.raises(UnknownStrategy, match=f"{setting} does nothing with strategy '{strategy}'"):
                trainer(strategy, sharding=sharding)
        else:
            made = trainer(strategy, sharding=sharding).strategy
            assert made.sharding == sharding
