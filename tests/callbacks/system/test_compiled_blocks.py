"""`compiled_blocks`: what is compiled, how often, and that it stays the user's model."""

from collections import Counter
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from toy import WIDTH, held_out, loader, toy

from shoestring.callbacks import CompiledBlocks, IncompatibleTechniques
from shoestring.callbacks.system import compiled_blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


class Deep(nn.Module):
    """As many blocks as one likes, of a class of torch's own."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def set_up(module: nn.Module, **settings: Any) -> CompiledBlocks:
    torch.compiler.reset()
    counters.clear()
    technique = CompiledBlocks(**settings)
    technique.setup(None, module, "fit")  # type: ignore[arg-type]
    return technique


def train(*techniques: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    losses: list[float] = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            losses.append(float(outputs["loss"]))

    module = toy(dropout=0.0)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=6, max_epochs=-1, callbacks=[Record(), *techniques], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, loader(shuffle=False), held_out())
    return module.state_dict(), losses


def test_the_compiled_model_trains_as_the_other_does_up_to_rounding() -> None:
    plain, compiled = train(), train(CompiledBlocks())
    assert compiled[1] == pytest.approx(plain[1], rel=1e-4)
    assert list(compiled[0]) == list(plain[0]), "names of weights stay"
    assert any(not torch.equal(plain[0][name], compiled[0][name]) for name in plain[0]), "nothing was compiled"


def test_all_alike_share_one_compilation_for_all_shapes() -> None:
    module = Deep(depth=12)
    technique = set_up(module, backend="aot_eager")
    for rows, length in ((4, 16), (4, 9), (2, 31), (7, 5)):
        module(torch.randn(rows, length, WIDTH, requires_grad=True)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["graph_break"] == Counter()
    technique.teardown(None, module, "fit")  # type: ignore[arg-type]
    counters.clear()
    module(torch.randn(3, 3, WIDTH))
    assert counters["stats"] == Counter(), "taken away at the end"


def test_every_second() -> None:
    module = Deep(depth=5)
    set_up(module, every=2, backend="eager")
    assert [block._compiled_call_impl is not None for block in module.blocks] == [True, False, True, False, True]


def test_a_hook_that_comes_later_is_seen() -> None:
    module = Deep(depth=2)
    set_up(module, backend="aot_eager")
    x = torch.randn(2, 4, WIDTH)
    before = module(x)
    handle = module.blocks[1][0].register_forward_hook(lambda layer, given, out: out * 0)
    after = module(x)
    handle.remove()
    assert not torch.equal(before, after), "a compiled block has hooks of its own layers"
    assert torch.equal(module(x), before)


def test_what_the_user_has_compiled_stays_his() -> None:
    module = Deep(depth=2)
    module.blocks[0].compile(backend="eager")
    own = module.blocks[0]._compiled_call_impl
    technique = set_up(module, backend="aot_eager")
    assert module.blocks[0]._compiled_call_impl is not own
    technique.teardown(None, module, "fit")  # type: ignore[arg-type]
    assert module.blocks[0]._compiled_call_impl is own
    assert "_compiled_call_impl" not in vars(module.blocks[1])


def test_shapes_without_end_are_an_error_and_do_not_run_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which shapes came before would decide what is compiled, and a resumed run would compute other bits."""
    monkeypatch.setattr(compiled_blocks, "_VARIANTS", 2)
    module = Deep(depth=2)
    technique = set_up(module, dynamic=False, backend="eager")
    for length in (3, 4):
        module(torch.randn(2, length, WIDTH, requires_grad=True))
    with pytest.raises(FailOnRecompileLimitHit):
        module(torch.randn(2, 5, WIDTH, requires_grad=True))
    technique.teardown(None, module, "fit")  # type: ignore[arg-type]
    module(torch.randn(2, 5, WIDTH))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(IncompatibleTechniques, match="compiled_blocks finds no repeated blocks in Linear"):
        set_up(nn.Linear(3, 3))
