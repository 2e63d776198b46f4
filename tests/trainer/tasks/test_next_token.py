"""The loss in chunks is the loss: its sums and gradients, for heads of every kind, on shards, and in little memory."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from processes import succeed
from torch.utils.data import DataLoader, Dataset

from shoestring.callbacks.forward.model_calls import calls_of
from shoestring.recipes.schema import OptimizerSpec
from shoestring.trainer import Trainer
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.tasks import next_token
from shoestring.trainer.tasks.language import CausalLM
from shoestring.trainer.tasks.next_token import NextTokenLoss

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
# each has an output layer of another make; the last two do something to the logits after it
KINDS = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 96, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "bert": {"is_decoder": True},
    "gemma2": {"final_logit_softcapping": 3.0, "num_key_value_heads": 2, "head_dim": 16},
    "granite": {"logits_scaling": 3.0},
}
VOCABULARY = 4096  # times 32: more than what ZeRO-3 leaves whole on every rank
IN_CHUNKS = ("llama", "gpt2", "opt")


def model_of(kind: str) -> Any:
    torch.manual_seed(1)
    fields = KINDS[kind] if kind == "gpt2" else {**SIZES, **KINDS[kind]}
    config = transformers.AutoConfig.for_model(kind, **fields)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def batch_of(rows: int = 3, length: int = 24) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 96, (rows, length), generator=draw)
    labels = ids.clone()
    labels[0, 10:] = labels[1, :] = -100  # a padded row, and one without a target
    return {"input_ids": ids, "labels": labels}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of logits at a time, and every batch is large."""
    monkeypatch.setattr(next_token, "CHUNK", 7 * 96)
    monkeypatch.setattr(next_token, "LARGE", 0)


def results(loss: NextTokenLoss, model: Any, weights: torch.Tensor | None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total, targets = loss(model, batch_of(), weights)
    assert targets == 9 + 23
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_whole(kind: str, small_chunks: None) -> None:
    model, auto = model_of(kind), NextTokenLoss("auto")
    for weights in (None, torch.tensor([0.5, 2.0, 3.0])):
        whole, gradients = results(NextTokenLoss(False), model, weights)
        parts, others = results(auto, model, weights)
        assert parts == pytest.approx(whole, rel=1e-6) and others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
    assert auto._possible == (kind in IN_CHUNKS)
    if kind not in IN_CHUNKS:
        with pytest.raises(TaskError, match=rf"model\.chunked_loss: this {kind} model does more to its logits"):
            NextTokenLoss(True)(model, batch_of())


def test_the_whole_loss_is_that_of_transformers_itself() -> None:
    model = model_of("llama")
    total, targets = NextTokenLoss(False)(model, batch_of())
    assert float((total / targets).detach()) == pytest.approx(float(model(**batch_of()).loss.detach()), rel=1e-6)


def test_no_more_logits_than_a_chunk_exist(small_chunks: None) -> None:
    model, seen = model_of("llama"), []
    model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.numel()))
    loss = NextTokenLoss(True)
    loss(model, batch_of())  # asks the model once
    seen.clear()
    total, _ = loss(model, batch_of())
    total.backward()
    assert max(seen) <= 7 * 96 and sum(seen) == 2 * 3 * 23 * 96  # forward, and again in backward
    seen.clear()
    with torch.no_grad():
        loss(model, batch_of())
    assert max(seen) <= 7 * 96 and sum(seen) == 3 * 23 * 96


def test_adapters_of_the_output_layer_take_part(small_chunks: None) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(model_of("llama"), config).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    whole, gradients = results(NextTokenLoss(False), model, None)
    parts, others = results(NextTokenLoss(True), model, None)
    assert parts == pytest.approx(whole, rel=1e-6) and any("lm_head" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_model_that_something_watches_is_called_as_it_is(small_chunks: None) -> None:
    model, loss = model_of("llama"), NextTokenLoss("auto")
    with calls_of(model) as calls:
        loss(model, batch_of())
    assert [call.output.logits.shape for call in calls] == [(3, 24, 96)]
    before = len(calls)
    loss(model, batch_of())
    assert len(calls) == before


def test_small_logits_stay_whole() -> None:
    loss = NextTokenLoss("auto")
    loss(model_of("llama"), batch_of())
    assert loss._possible is None


@pytest.mark.parametrize("chunked", [True, False])
def test_a_batch_without_a_target_has_a_loss_of_zero(chunked: bool) -> None:
    module = CausalLM(model_of("llama").train(), OptimizerSpec(), chunked_loss=chunked)
    batch = batch_of()
    batch["labels"][:] = -100
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in module.parameters())


class Rows(Dataset):
    """Eight rows of 5 to 40 tokens, so that the batches of two ranks differ in length."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(5 * (index + 1)) * (index + 3)) % 96
        return {"input_ids": ids, "labels": ids}


def on_shards(strategy: str, folder: Path, chunked: bool) -> None:
    """Two steps, and the weights and the validation loss that they give."""
    warnings.simplefilter("ignore")
    next_token.CHUNK, next_token.LARGE = 7 * VOCABULARY, 0
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": VOCABULARY})
    module = CausalLM(transformers.LlamaForCausalLM(config), OptimizerSpec(name="sgd", lr=0.5), chunked_loss=chunked)
    trainer = Trainer(
        max_steps=2, max_epochs=-1, strategy=strategy, devices=2, accelerator="cpu", ledger=False,
        run_dir=folder / f"run-{chunked}", num_sanity_val_steps=0, val_check_interval=2, accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Rows(), batch_size=1), DataLoader(Rows(), batch_size=1))
    if os.environ["RANK"] == "0":
        (folder / f"loss-{chunked}.json").write_text(json.dumps(float(trainer.callback_metrics["val_loss"])))


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_the_loss_in_chunks_trains_shards_alike(strategy: str, tmp_path: Path) -> None:
    """Under ZeRO-3 the output layer is gathered at each call, so all ranks have to call it equally often."""
    for chunked in (True, False):
        succeed(on_shards, strategy, tmp_path, chunked, world=2, folder=tmp_path, timeout=60)
    losses = [json.loads((tmp_path / f"loss-{chunked}.json").read_text()) for chunked in (True, False)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    ends = [load_weights(tmp_path / f"run-{chunked}" / "final") for chunked in (True, False)]
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["flash", "flex"])
def test_attention_that_a_cpu_does_not_have_is_refused(attention: str, tiny: Any) -> None:
    if torch.cuda.is_available():
        return
    with pytest.raises(TaskError, match=rf"model\.attention: {attention} needs a CUDA device; on a CPU there are sdpa"):
        tiny.task(model={"task": "causal-lm", "config": tiny.llama, "attention": attention})


@pytest.mark.parametrize(("attention", "wanted"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_attention_is_the_one_that_the_recipe_names(attention: str, wanted: str, tiny: Any) -> None:
    task = tiny.task(model={"task": "causal-lm", "config": tiny.llama, "attention": attention})
    assert task.module.model.config._attn_implementation == wanted


def test_attention_that_a_model_does_not_have_is_refused_by_its_key(tiny: Any) -> None:
    bloom = {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2}
    assert tiny.task(model={"config": bloom}).module.model.config._attn_implementation == "eager"
    with pytest.raises(TaskError, match=r"model\.attention: sdpa is not to be had: BloomForCausalLM does not support"):
        tiny.task(model={"config": bloom, "attention": "sdpa"})
