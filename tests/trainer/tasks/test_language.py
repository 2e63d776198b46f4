"""Language modelling: what is learned, what the loss is averaged over, that packed documents are apart."""

from __future__ import annotations

import json
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from chat_ranks import gradient
from processes import succeed
from safetensors.torch import load_file

from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.data.tokens import Blocks, PadTokens, stack
from shoestring.trainer.tasks import Task, build_task
from shoestring.trainer.tasks.generate import complete
from shoestring.trainer.tasks.isolation import check_isolation, leak, lookahead


def test_a_language_model_learns_and_its_validation_loss_is_exact(tiny: Any) -> None:
    task = tiny.task()
    tiny.fit(task, 40)
    metrics = tiny.validate(task)
    assert metrics["val_loss"] < task.facts["baselines"]["unigram"] < task.facts["baselines"]["uniform"]
    assert metrics["val_perplexity"] == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-4)

    module, total, count = task.module.eval(), 0.0, 0
    for i in range(len(task.validation)):  # one block at a time, the padded tail included
        sample = {name: value[None] for name, value in task.validation[i].items()}
        with torch.no_grad():
            logits = module.model(input_ids=sample["input_ids"], position_ids=sample["position_ids"]).logits[0, :-1]
        labels = sample["labels"][0, 1:]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    assert (task.validation[len(task.validation) - 1]["labels"] == -100).any(), "the tail is not the case it should be"
    assert metrics["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert count == task.facts["validation_tokens"] - len(task.validation)


def test_facts_count_what_is_there(tiny: Any) -> None:
    task = tiny.task()
    facts, model = task.facts, task.module.model
    assert task.unit == "tokens" and facts["model_type"] == "llama"
    assert facts["vocab_size"] == len(task.tokenizer) == model.config.vocab_size == 384
    assert facts["train_samples"] == len(task.train) and facts["train_tokens"] == 64 * len(task.train)
    assert facts["parameters"] == facts["trainable"] == sum(p.numel() for p in model.parameters())
    assert model.config.use_cache is False and model.config._attn_implementation == "sdpa"


def test_the_seed_alone_decides_the_first_weights(tiny: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = tiny.task().module.state_dict()
    assert torch.equal(before, torch.get_rng_state()), "building a task used the caller's random numbers"
    torch.manual_seed(6)
    second = tiny.task().module.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_task(tiny.recipe().model_copy(update={"seed": 1}), workdir=tmp_path).module.state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_completion_is_repeatable_and_leaves_random_numbers_alone(tiny: Any) -> None:
    task = tiny.task()
    tiny.fit(task, 5)
    before = torch.get_rng_state()
    texts = [complete(task.module, task.tokenizer, "def f(", max_new_tokens=12, temperature=t, seed=s)
            for t, s in ((0, 0), (0, 1), (1.5, 0), (1.5, 0), (1.5, 1))]  # fmt: skip
    assert torch.equal(before, torch.get_rng_state()) and task.module.training
    assert texts[0] == texts[1] and texts[2] == texts[3] and texts[2] != texts[4] and texts[0] != texts[2]


def test_blocks_by_hand(tiny: Any) -> None:
    store = tiny.bytes(["abcd", "e", "fghij"])  # stream: 0abcd 0e 0fghij = 13 tokens
    blocks = Blocks(store, 5, keep_tail=True)
    assert [block["input_ids"].tolist() for block in blocks] == [
        [0, *b"abcd"], [0, *b"e", 0, *b"fg"], [*b"hij", 0, 0]]  # fmt: skip
    assert [block["position_ids"].tolist() for block in blocks] == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert blocks[2]["labels"].tolist() == [*b"hij", -100, -100] and blocks[1]["labels"].tolist() == [
        0,
        *b"e",
        0,
        *b"fg",
    ]
    assert blocks.target_counts.tolist() == [4, 4, 2]
    assert len(Blocks(store, 5)) == 2 and "position_ids" not in Blocks(store, 5, isolate=False)[0]
    assert len(pickle.dumps(blocks)) < 1000, "the tokens travel with the data set"
    assert store.tokens.dtype == np.uint16 and store.document(2).tolist() == [0, *b"fghij"]


def test_packed_documents_do_not_attend_to_each_other(tiny: Any) -> None:
    task = tiny.task()
    model = task.module.model.eval()
    borders = next(i for i in range(len(task.train)) if (task.train[i]["position_ids"][1:] == 0).any())
    block = stack([task.train[borders]])
    start = int((block["position_ids"][0, 1:] == 0).nonzero()[0]) + 1  # where the second document opens
    changed = {name: value.clone() for name, value in block.items()}
    changed["input_ids"][:, 1:start] = (changed["input_ids"][:, 1:start] + 7) % 300
    with torch.no_grad():
        one, two = (model(**batch).logits[0] for batch in (block, changed))
        without_position_ids = [{**batch, "position_ids": torch.arange(64)[None]} for batch in (block, changed)]
        one_leaky, two_leaky = (model(**batch).logits[0] for batch in without_position_ids)
    assert not torch.allclose(one[:start], two[:start]), "the first document did not change"
    assert torch.allclose(one[start:], two[start:], atol=1e-6)
    assert not torch.allclose(one_leaky[start:], two_leaky[start:], atol=1e-4), "this test cannot see a leak"


def test_the_self_check_finds_leaks_in_other_and_in_real_models(tiny: Any) -> None:
    ids = torch.arange(40) % 30
    model = tiny.task().module.model
    assert leak(model, ids).share < 1e-6
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        apart, together = leak(model.to(dtype), ids), leak(model.to(dtype), ids, isolate=False)
        assert apart.share < apart.allowed < together.share / 3, dtype
    model.float()
    check_isolation(model, ids)

    # Bloom ignores positions, so nothing keeps its documents apart
    bloom = {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2}
    with pytest.raises(TaskError, match=r"bloom.*data\.pack: false"):
        tiny.fit(tiny.task(model={"config": bloom}), 1)
    accepted = tiny.task(model={"config": bloom}, data={"args": {"pack_isolation": False}})
    assert "position_ids" not in accepted.train[0]
    tiny.fit(accepted, 1)


def test_the_self_check_changes_nothing(tiny: Any) -> None:
    model = {"config": {**tiny.llama, "attention_dropout": 0.3}}
    one, two = tiny.task(model=model), tiny.task(model=model)
    two.module._unchecked = False
    for task in (one, two):
        pl.seed_everything(3, verbose=False)
        tiny.fit(task, 3)
    assert not one.module._unchecked
    pairs = zip(one.module.state_dict().values(), two.module.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def gradients(task: Task, micro: list[list[int]], weights: list[float] | None = None) -> torch.Tensor:
    """Gradients of one optimizer step over these micro-batches, as Lightning accumulates them."""
    task.module.zero_grad()
    for number, rows in enumerate(micro):
        batch = task.collate([task.train[i] for i in rows])
        if weights is not None:
            batch["loss_weight"] = torch.tensor(weights[number])
        (task.module.training_step(batch, 0) / len(micro)).backward()
    return torch.cat([p.grad.flatten() for p in task.module.parameters()])


def test_packed_gradients_do_not_depend_on_the_micro_batch(tiny: Any) -> None:
    task = tiny.task()
    whole = gradients(task, [list(range(8))])
    assert torch.allclose(gradients(task, [[0, 1], [2, 3], [4, 5], [6, 7]]), whole, atol=1e-6)


def test_padded_gradients_are_exact_with_weights_and_only_then(tiny: Any, tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    texts = [
        "x = 1",
        "import os, sys, re",
        "y",
        "def f(a): return a + 1",
        "z = [i for i in range(10)]",
        "w",
        "u = 2",
        "v",
    ]
    lines.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    task = tiny.task(data={"source": str(lines), "pack": False, "validation": 0.0, "limit": None})
    order = np.argsort(task.train.target_counts).tolist()  # short ones together: the worst case for a mean of means
    micro = [order[i : i + 2] for i in range(0, 8, 2)]
    counts = [int(task.train.target_counts[rows].sum()) for rows in micro]
    whole = gradients(task, [order])
    weights = [count * len(counts) / sum(counts) for count in counts]  # each micro-batch's share of the global mean
    assert torch.allclose(gradients(task, micro, weights), whole, atol=1e-6)
    assert not torch.allclose(gradients(task, micro), whole, atol=1e-3)


def test_rows_cut_shorter_still_train(tiny: Any) -> None:
    """Length warmup cuts every [B, T] tensor of a batch; nothing else in it may depend on T."""
    task = tiny.task()
    batch = task.collate([task.train[i] for i in range(4)])
    assert all(value.shape == (4, 64) for value in batch.values())
    assert task.module.training_step({name: value[:, :16] for name, value in batch.items()}, 0).isfinite()


def test_padding_is_masked() -> None:
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    batch = PadTokens(9)([{"input_ids": row, "labels": row} for row in rows])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]] and batch["labels"].tolist() == [
        [5, 6, 7],
        [8, -100, -100],
    ]
    classes = PadTokens(9)([{"input_ids": row, "labels": torch.tensor(2)} for row in rows])
    assert classes["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and classes["labels"].tolist() == [2, 2]


def test_special_tokens_in_a_document_are_text(tiny: Any, tmp_path: Path) -> None:
    text = "a text ends with <|endoftext|> and rows with <|pad|>"
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "another"}))
    data = {"source": str(tmp_path / "d.jsonl"), "limit": None, "validation": 0, "sequence_length": 128, "pack": False}
    task = tiny.task(data=data)
    ids, end = task.train[0]["input_ids"].tolist(), task.tokenizer.eos_token_id
    assert ids.count(end) == 1 and ids[-1] == end and task.tokenizer.pad_token_id not in ids
    assert task.tokenizer.decode(ids[:-1]) == text
    assert task.tokenizer(text)["input_ids"].count(end) == 1, "asked directly, as by a prompt, it is the token still"
    model = {"task": "sequence-classification", "config": {**tiny.llama, "model_type": "bert"}}
    lines = [json.dumps({"text": text, "label": label}) for label in "xy"]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    assert end not in tiny.task(model=model, data=data).train[0]["input_ids"].tolist()


BERT = {"model_type": "bert", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 66}  # fmt: skip


@pytest.mark.parametrize("pack", [True, False])
def test_an_encoder_as_a_causal_model_is_made_causal_or_refused(tiny: Any, pack: bool) -> None:
    data = {"pack": pack}
    model = tiny.task(model={"config": BERT}, data=data).module.model
    ids = torch.arange(40) % 30
    assert model.config.is_decoder and lookahead(model, ids).share < 1e-4
    encoder = tiny.task(model={"config": {**BERT, "is_decoder": False}}, data=data)
    assert lookahead(encoder.module.model, ids).share > 1e-4
    with pytest.raises(TaskError, match=r"in this bert model they see later ones"):
        tiny.fit(encoder, 1)


def test_positions_that_begin_after_the_paddings_are_known(tiny: Any) -> None:
    """RoBERTa's tokenizers pad with 1; ours have 0 as end and 1 as padding, too. OPT's offset is not in its limit."""
    roberta = {**BERT, "model_type": "roberta"}
    task = tiny.task(model={"config": roberta})  # 66 position numbers, 64 tokens
    assert task.tokenizer.pad_token_id == 1 and task.module._first_position == 2
    block = stack([task.train[i] for i in range(2)])
    with torch.no_grad():
        loss = task.module.eval().training_step({**block, "position_ids": torch.arange(64).expand(2, -1)}, 0)
        own = task.module.model(input_ids=block["input_ids"], labels=block["labels"]).loss
    assert loss == pytest.approx(own.item(), abs=1e-6), "a packed row is numbered as the model numbers one"
    tiny.fit(tiny.task(model={"config": roberta}, data={"pack": False}), 1)
    with pytest.raises(
        TaskError, match=r"64 is above the model's max_position_embeddings 65 less the 2 that .*roberta"
    ):
        tiny.task(model={"config": {**roberta, "max_position_embeddings": 65}})
    opt = {"model_type": "opt", "hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
           "word_embed_proj_dim": 32, "max_position_embeddings": 64}  # fmt: skip
    tiny.fit(tiny.task(model={"config": opt}, data={"pack": False}), 1)


def test_rows_are_filled_up_with_the_tokenizers_own_padding(tiny: Any) -> None:
    task = tiny.task()
    tail = task.validation[len(task.validation) - 1]
    filled = tail["input_ids"][tail["labels"] == -100]
    assert len(filled) and (filled == task.tokenizer.pad_token_id).all() and task.tokenizer.pad_token_id != 0
    assert task.module.model.config.pad_token_id == task.tokenizer.pad_token_id


# -- chats -------------------------------------------------------------------------------------------------------------
WAYS = {  # ranks, micro-batch, packed
    "one": (1, 8, False), "micro-batches of 1": (1, 1, False), "2 ranks": (2, 2, False),
    "2 ranks, micro-batches of 1": (2, 1, False), "packed": (1, 2, True), "packed on 2 ranks": (2, 1, True),
}  # fmt: skip


def test_every_trained_token_of_a_global_batch_weighs_alike(tmp_path: Path) -> None:
    answers = ["ok", "yes and no and yes", "a", "one two three four five", "b", "no", "maybe so", "c d"]
    rows = [{"question": "q" * (i + 1), "answer": answer} for i, answer in enumerate(answers)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, (ranks, micro, pack) in WAYS.items():
        settings = {"ranks": ranks, "micro": micro, "pack": pack, "samples": 4 if pack else len(rows)}
        succeed(partial(gradient, tmp_path, name, **settings), world=ranks, folder=tmp_path / name)
    first = load_file(tmp_path / "one.safetensors")
    for name in WAYS:
        other = load_file(tmp_path / f"{name}.safetensors")
        assert max(float((other[key] - first[key]).abs().max()) for key in first) < 1e-6, name
