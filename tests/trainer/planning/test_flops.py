"""FLOPs of every shape a step can have: what a run counts against torch's own counter, and what a plan expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from shoestring.callbacks.accounting.flops import FlopCounter, Flops
from shoestring.recipes import recipe_from
from shoestring.recipes.schema import AdapterSpec, OptimizerSpec
from shoestring.trainer.planning.sizes import size_of
from shoestring.trainer.tasks import next_token
from shoestring.trainer.tasks.language import CausalLM
from shoestring.trainer.tasks.lora import add_adapter
from shoestring.trainer.tasks.quantized_loading import make_quantized

pytestmark = pytest.mark.filterwarnings("ignore")
VOCABULARY, ROWS, LENGTH, LAYERS, RANK = 96, 2, 24, 4, 4
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# torch's counter knows no attention on CPUs
OF_CPUS = {
    ATTENTION: lambda q, k, v, *_, out_val=None, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, out_val=None, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


def llama(**changes: Any) -> Any:
    shape = {**SHAPE, "vocab_size": VOCABULARY, "use_cache": False, **changes}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))


def adapted(model: Any) -> Any:
    return add_adapter(model, AdapterSpec(rank=RANK), "causal-lm")


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def batch(packed: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    half = torch.arange(LENGTH // 2).repeat(2).expand(ROWS, -1)
    return {"input_ids": ids, "labels": ids, **({"position_ids": half} if packed else {})}


def both(model: Any, given: dict[str, torch.Tensor], chunked: bool = False) -> tuple[Flops, int]:
    """Of one step: ours, and torch's. The first step is not looked at: models are asked things in it."""
    module = CausalLM(model, OptimizerSpec(), chunked_loss=chunked)
    step: Callable[[], None] = lambda: module.training_step(given, 0).backward()  # noqa: E731
    step()
    with FlopCounter() as ours:
        step()
    with FlopCounterMode(display=False, custom_mapping=OF_CPUS) as theirs:
        step()
    return ours.flops, theirs.get_total_flops()


PLAIN: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {  # how a model is made, and its step
    "plain": (llama, {}),
    "eager attention": (lambda: llama(attn_implementation="eager"), {}),
    "grouped queries": (lambda: llama(num_key_value_heads=2), {}),
    "wide heads": (lambda: llama(head_dim=16), {}),
    "tied": (lambda: llama(tie_word_embeddings=True), {}),
    "packed": (llama, {"given": batch(packed=True)}),
    "adapters": (lambda: adapted(llama()), {}),
    "nf4": (lambda: adapted(make_quantized(llama, "nf4")), {}),
    "int8": (lambda: adapted(make_quantized(llama, "int8")), {}),
}

ADAPTED = ("adapters", "nf4", "int8")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_token, "CHUNK", VOCABULARY * 8)


@pytest.mark.parametrize("name", PLAIN)
def test_every_shape_is_counted_as_torch_counts_it(name: str, small_chunks: None) -> None:
    """Computed again or not: what is executed more often is realised, and nothing else is counted for it."""
    make, options = PLAIN[name]
    options = {"given": batch(), **options}
    plain, theirs = both(make(), **options)
    assert plain.counted == plain.realised == theirs
    again, theirs = both(checkpointed(make()), **options)
    first = 0
    if name in ADAPTED:  # what enters the first block then has a gradient, which goes through its queries, keys, values
        first = 2 * ROWS * LENGTH * 3 * (SHAPE["hidden_size"] + RANK) * SHAPE["hidden_size"]
    assert (again.counted, again.realised) == (plain.counted + first, theirs) and theirs > plain.realised
    chunked, theirs = both(make(), chunked=True, **options)
    head = 2 * SHAPE["hidden_size"] * VOCABULARY * ROWS  # the last position of a row has no target
    products = 2 if name in ADAPTED else 3  # a frozen output layer has no gradient of its own
    assert (chunked.counted, chunked.realised) == (plain.counted - products * head, theirs)
    assert chunked.realised - chunked.counted == head * (LENGTH - 1)


def test_a_frozen_weight_has_no_gradient_of_its_own() -> None:
    whole, _ = both(llama(), batch())
    frozen, _ = both(adapted(llama()), batch())
    quantized, _ = both(adapted(make_quantized(llama, "nf4")), batch())
    assert quantized == frozen
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    multiplied = LAYERS * (4 * hidden**2 + 3 * hidden * inner) + hidden * VOCABULARY
    beside = LAYERS * RANK * (4 * 2 * hidden + 3 * (hidden + inner))
    first = 3 * (hidden + RANK) * hidden  # and what enters the first block has no gradient
    spared = 2 * multiplied + 2 * 3 * hidden**2 - (6 * beside - 2 * (first - 3 * hidden**2))
    assert whole.counted - frozen.counted == spared * ROWS * LENGTH


def test_a_head_of_classes() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE, vocab_size=VOCABULARY, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    ids = batch()["input_ids"]
    step = lambda: model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()  # noqa: E731
    with FlopCounter() as ours:
        step()
    with FlopCounterMode(display=False, custom_mapping=OF_CPUS) as theirs:
        step()
    assert ours.flops.counted == ours.flops.realised == theirs.get_total_flops()


def test_what_a_model_is_asked_in_its_first_step_is_no_part_of_it(small_chunks: None) -> None:
    """The count of a kind of step is taken once, in the step that also checks masks and the way of the loss."""
    module, given = CausalLM(llama(), OptimizerSpec(), isolated=True, chunked_loss=True), batch(packed=True)
    counts = []
    for _ in range(2):
        with FlopCounter() as counter:
            module.on_train_batch_start(given, 0)
            module.training_step(given, 0).backward()
        counts.append(counter.flops)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in ("packed", "eager attention")])
def test_a_plan_expects_what_a_run_counts(name: str) -> None:
    """But for attention, whose scores torch's kernel computes again, and for what needs no gradient before adapters."""
    make, _ = PLAIN[name]
    counted, _ = both(make(), batch())
    config = {"model_type": "llama", **SHAPE, "vocab_size": VOCABULARY}
    config |= {"num_key_value_heads": 2} if name == "grouped queries" else {}
    config |= {"head_dim": 16} if name == "wide heads" else {}
    config |= {"tie_word_embeddings": True} if name == "tied" else {}
    model: dict[str, Any] = {"task": "causal-lm", "config": config, "tokenizer": {"train": "bpe"}}
    if name in ADAPTED:
        model |= {"adapter": {"kind": "lora", "rank": RANK}, "dtype": "auto" if name == "adapters" else name}
    values = {"model": model, "data": {"source": "python-stdlib"}, "budget": {"steps": 10}}
    expected = size_of(recipe_from(values)).flops_per_token(LENGTH) * ROWS * LENGTH
    queries = 4 * (16 if name == "wide heads" else 8)
    expected += LAYERS * 2 * queries * LENGTH * ROWS * LENGTH  # the seventh product
    assert counted.counted == pytest.approx(expected, rel=0.05 if "adapter" in model else 1e-3)
