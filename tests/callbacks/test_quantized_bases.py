"""Every technique beside a low-bit base: refused by the plan with its reason, or the codes stay what they are."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import kept_base_ranks
import pytest
import pytorch_lightning as pl
import torch
from adapted import Crash
from fits import llama
from torch.utils.data import DataLoader
from toy import Exploded, fingerprint

from shoestring.callbacks import IncompatibleTechniques
from shoestring.callbacks.catalog.registry import TECHNIQUES, declare, technique_class
from shoestring.callbacks.parameters.layers import owners, quantizable, trained_weights
from shoestring.recipes import recipe_from
from shoestring.recipes.schema import AdapterSpec
from shoestring.trainer import Trainer, plan
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.tasks.lora import add_adapter
from shoestring.trainer.tasks.quantized import QuantizedLinear
from shoestring.trainer.tasks.quantized_loading import make_quantized

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 2}  # fmt: skip
EDIT_ALL_WEIGHTS = {"quantization_aware", "structured_pruning", "synflow"}  # frozen ones too


def recipe(dtype: str, technique: str):
    model = {"task": "causal-lm", "config": CONFIG, "tokenizer": {"train": "bpe"}, "dtype": dtype,
             "adapter": {"kind": "lora", "rank": 2}}  # fmt: skip
    settings = {key: value for key, value in vars(type(declare(technique)).example()).items() if key[0] != "_"}
    named = {key: settings[key] for key in declare(technique).setting_names() if key in settings}
    return recipe_from(
        {
            "model": model, "data": {"source": "python-stdlib"}, "budget": {"steps": 1000},
            "strategy": {"name": "single"}, "techniques": [{technique: named}],
        }
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(EDIT_ALL_WEIGHTS))
def test_what_edits_frozen_weights_is_refused_before_anything_is_spent(name):
    with pytest.raises(IncompatibleTechniques, match=f"{name} does not work with 'model.dtype nf4 or int8'"):
        plan(recipe("nf4", name))
    assert name in {technique.card.name for technique in plan(recipe("auto", name)).declared}


def test_the_cards_say_which_they_are():
    assert {name for name in TECHNIQUES if "model.dtype nf4 or int8" in declare(name).card.refuses} == EDIT_ALL_WEIGHTS


def test_codes_are_nobodys_weights():
    """Pruning, clustering and rounding choose from these; adapters and what trains beside them stay."""
    adapted = add_adapter(make_quantized(llama, "nf4"), AdapterSpec(rank=2), "causal-lm")
    codes = {f"{name}.weight" for name, part in adapted.named_modules() if isinstance(part, QuantizedLinear)}
    assert len(codes) == 14
    for chosen in (owners(adapted), quantizable(adapted), trained_weights(adapted)):
        assert not codes & set(chosen)
    assert len(trained_weights(adapted)) == 28
    assert {adapted.get_parameter(name).dtype for name in owners(adapted)} == {torch.float32}


IN_EIGHT_BITS = ["gradual_pruning", "weight_averaging", "weight_clustering"]  # the layers are those of nf4


def trained(name: str, kind: str, run_dir: Path, *callbacks: pl.Callback) -> tuple[str, list[float]]:
    """Train adapters for four steps with one technique: what is left, and the losses. The base stays as it is."""
    module, losses = kept_base_ranks.adapted(kind), kept_base_ranks.Losses()
    base = {n: (p, p.detach().clone()) for n, p in module.named_parameters() if not p.requires_grad}
    trainer = Trainer(
        techniques=[technique_class(name).example()], strategy="single", run_dir=run_dir, ledger=False,
        accelerator="cpu", checkpoint_every="2 steps", callbacks=[losses, *callbacks], max_steps=4, max_epochs=-1,
    )  # fmt: skip
    try:
        trainer.fit(module, DataLoader(kept_base_ranks.rows(), batch_size=4, shuffle=True))
    finally:
        now = dict(module.named_parameters())
        changed = [n for n, (p, before) in base.items() if now.get(n) is not p or not torch.equal(p, before)]
        assert not changed, f"{name} has changed the frozen {changed}"
    return fingerprint(load_weights(run_dir / "final")), losses.seen


@pytest.mark.parametrize(
    ("kind", "name"), [*(("nf4", name) for name in TECHNIQUES), *(("int8", name) for name in IN_EIGHT_BITS)]
)
def test_every_technique_trains_and_resumes_beside_codes_or_is_refused(kind, name, tmp_path):
    try:
        plan(recipe(kind, name))
    except IncompatibleTechniques as refused:
        fact = "model.dtype nf4 or int8" if name in EDIT_ALL_WEIGHTS else "model.adapter"
        assert name in {*EDIT_ALL_WEIGHTS, "low_rank"} and f"{name} does not work with '{fact}'" in str(refused)
        return
    whole, seen = trained(name, kind, tmp_path / "whole")
    with suppress(Exploded):
        trained(name, kind, tmp_path / "broken", Crash(3))
    resumed, rest = trained(name, kind, tmp_path / "broken")
    assert rest == seen[-2:] and resumed == whole
