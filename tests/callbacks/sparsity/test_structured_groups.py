"""Which channels, neurons and heads are cut together, which of them go, and what is left of the model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from shoestring.callbacks.parameters.cut import (
    Cut,
    WrongShape,
    is_shrunk,
    rebuild_model,
    shrink,
    shrink_tensor,
    update_configurations,
)
from shoestring.callbacks.sparsity.structured_groups import (
    Member,
    choose,
    importance,
    keep,
    width,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def squares(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().square() for name, p in module.named_parameters()}


def kept(cut: Cut) -> dict[str, list[tuple[int, list[int]]]]:
    return {name: [(dim, index.tolist()) for dim, index in dims] for name, dims in cut.indices().items()}


def whole_numbers(module: nn.Module) -> nn.Module:
    """Weights of small whole numbers: sums of their products are exact in whatever order they are taken.

    Batch norms divide by 1, so those of the models here have eps=0.
    """
    draw = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.randint(-4, 5, p.shape, generator=draw).float()
    return module.eval()


# -- numbers ---------------------------------------------------------------------------------------------------------
def test_importance_sums_what_goes_with_a_channel():
    """Two channels: rows of `a`, and of `b` columns 0-1 and 2-3."""
    scores = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([[1.0, 0.0, 5.0, 0.0]])}
    rows = Member("a", 0, torch.tensor([0, 1]), torch.tensor([0, 1]))
    columns = Member("b", 1, torch.arange(4), torch.tensor([0, 0, 1, 1]))
    unknown = Member("c", 0, torch.arange(2), torch.arange(2))
    assert importance([rows, columns, unknown], 2, scores).tolist() == [1 + 2 + 1, 3 + 4 + 5]


@pytest.mark.parametrize(
    ("channels", "ratio", "round_to", "left"),
    [
        (6, 0.5, 1, 3), (1536, 0.5, 16, 768), (384, 0.3, 16, 272), (48, 0.5, 16, 32), (23, 0.5, 16, 16),
        (23, 0.0, 16, 23), (8, 0.5, 16, 4), (4, 0.99, 1, 1), (40, 0.05, 16, 32), (64, 0.99, 16, 16),
    ],
)  # fmt: skip
def test_width(channels, ratio, round_to, left):
    assert width(channels, ratio, round_to) == left


def test_keep_takes_the_first_of_equals_and_whole_heads():
    assert keep(torch.tensor([1.0, 3.0, 1.0, 2.0]), 0.5).tolist() == [1, 3]
    assert keep(torch.ones(4), 0.5).tolist() == [0, 1]
    heads = torch.tensor([5.0, 0.0, 1.0, 1.0, 3.0, 3.0])  # three of two channels: 5, 2 and 6
    assert keep(heads, 0.3, unit=2, round_to=16).tolist() == [0, 1, 4, 5]


def test_shrink_tensor_by_hand():
    tensor = torch.arange(12.0).view(3, 4)
    rows, columns = torch.tensor([True, False, True]), torch.tensor([False, True, True, False])
    assert shrink_tensor(tensor, [(0, rows), (1, columns)]).tolist() == [[1, 2], [9, 10]]
    with pytest.raises(WrongShape, match="3 indices, and the cut is of 4"):
        shrink_tensor(tensor, [(0, columns)])


# -- models ----------------------------------------------------------------------------------------------------------
def test_mlp_by_hand():
    """Squares of row, bias and column of each neuron: 9+0+1, 0+1+0, 0+0+16, 2+0+1."""
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    net[0].weight.data = torch.tensor([[3.0, 0], [0, 0], [0, 0], [1, 1]])
    net[0].bias.data = torch.tensor([0.0, 1, 0, 0])
    net[2].weight.data = torch.tensor([[1.0, 0, 4, 1]])
    x = torch.randn(5, 2)
    cut = choose(net, lambda: net(x), squares(net), ratio=0.5, round_to=1)
    assert kept(cut) == {"0.weight": [(0, [0, 2])], "0.bias": [(0, [0, 2])], "2.weight": [(1, [0, 2])]}
    assert net[0].weight.shape == (4, 2) and net[0].out_features == 4, "choosing changes nothing"
    shrink(net, cut)
    assert net[0].weight.tolist() == [[3, 0], [0, 0]] and net[2].weight.tolist() == [[1, 4]]
    assert (net[0].out_features, net[2].in_features) == (2, 2)


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, eps=0), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4, 3),
    )  # fmt: skip


def test_conv_net_equals_the_masked_dense_one_exactly():
    """Norms, depthwise convolutions and flattened maps are cut along; cut channels were zero, so nothing changes."""
    net, x = whole_numbers(conv_net()), torch.randint(-3, 4, (4, 2, 4, 4)).float()
    net[1].running_mean.copy_(torch.arange(8))
    gone, flat = [1, 4, 6], [0, 5]
    for part in (net[0], net[1], net[3]):
        part.weight.data[gone] = 0
        part.bias.data[gone] = 0
    net[5].weight.data[:, gone] = 0
    net[5].weight.data[flat] = net[5].bias.data[flat] = 0
    net[8].weight.data[:, [4 * c + i for c in flat for i in range(4)]] = 0
    before = net(x)
    cut = choose(net, lambda: net(x), squares(net), ratio=1 / 3, round_to=1)
    stay, columns = [0, 2, 3, 5, 7], [4 * c + i for c in (1, 2, 3, 4) for i in range(4)]
    assert kept(cut)["5.weight"] == [(0, [1, 2, 3, 4]), (1, stay)]
    assert kept(cut)["1.running_mean"] == [(0, stay)] == kept(cut)["3.weight"]
    assert kept(cut)["8.weight"] == [(1, columns)]
    shrink(net, cut)
    assert torch.equal(net(x), before)
    assert net[3].groups == 5 and net[1].running_mean.tolist() == stay
    assert is_shrunk(net, cut)


def bert(heads: int = 4) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": heads}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=50, max_position_embeddings=20)).eval()


def test_bert_loses_heads_and_neurons_and_comes_back_from_disk(tmp_path):
    model, ids = bert(), torch.randint(0, 50, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    for layer in model.bert.encoder.layer:
        attention, output = layer.attention.self, layer.attention.output.dense
        for part in (attention.query, attention.key, attention.value):
            part.weight.data[8:16] = part.weight.data[24:] = part.bias.data[8:16] = part.bias.data[24:] = 0
        output.weight.data[:, 8:16] = output.weight.data[:, 24:] = 0
        layer.intermediate.dense.weight.data[::2] = layer.intermediate.dense.bias.data[::2] = 0
        layer.output.dense.weight.data[:, ::2] = 0
    run_it = lambda m: m(input_ids=ids, attention_mask=mask)  # noqa: E731
    before = run_it(model).logits
    cut = choose(model, lambda: run_it(model).logits, squares(model), ratio=0.5, skip=["*pooler*"])
    state = json.loads(json.dumps(cut.state()))
    assert Cut.of(state).state() == cut.state()
    shrink(model, cut)
    two = [*range(8), *range(16, 24)]
    name = "bert.encoder.layer.1.attention"
    for part in ("query", "key", "value"):
        assert kept(cut)[f"{name}.self.{part}.weight"] == [(0, two)]
    assert kept(cut)[f"{name}.output.dense.weight"] == [(1, two)]
    assert kept(cut)["bert.encoder.layer.0.output.dense.weight"] == [(1, list(range(1, 64, 2)))]
    attention = model.bert.encoder.layer[1].attention.self
    assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (2, 16, 8)
    assert not any("embeddings" in n or "LayerNorm" in n or "pooler" in n for n in cut.kept)
    assert torch.allclose(run_it(model).logits, before, atol=1e-6)

    update_configurations(model, [state])
    model.save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    assert config.num_attention_heads == 4, "the configuration describes the whole model"
    again = rebuild_model(type(model)(config), config.structured_cut).eval()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(run_it(again).logits, run_it(model).logits)
    assert rebuild_model(again, config.structured_cut) is again and is_shrunk(again, cut), "once is enough"


def test_pretrained_minilm_loses_half_of_its_heads_and_neurons():
    from transformers import AutoModel

    from shoestring.trainer.tasks.models import resolve_name

    model = AutoModel.from_pretrained(resolve_name("minilm")).eval()
    ids = torch.randint(0, 1000, (2, 9))
    whole = sum(p.numel() for p in model.encoder.parameters())
    forward = lambda: model(input_ids=ids).last_hidden_state  # noqa: E731
    cut = choose(model, forward, squares(model), ratio=0.5)
    shrink(model, cut)
    assert forward().shape == (2, 9, 384)
    assert {layer.attention.self.num_attention_heads for layer in model.encoder.layer} == {6}
    assert {layer.intermediate.dense.out_features for layer in model.encoder.layer} == {768}
    assert sum(p.numel() for p in model.encoder.parameters()) / whole == pytest.approx(0.5, abs=0.01)


def test_a_stream_that_comes_from_outside_stays_whole():
    """Without embeddings nothing but the sum shows that the width of the encoder is that of its input."""
    encoder, x = bert().bert.encoder, torch.randn(2, 5, 32)
    forward = lambda: encoder(x).last_hidden_state  # noqa: E731
    cut = choose(encoder, forward, squares(encoder), ratio=0.5)
    assert {name.split(".", 2)[2] for name in cut.kept} == {
        *(f"attention.self.{part}.{p}" for part in ("query", "key", "value") for p in ("weight", "bias")),
        "attention.output.dense.weight", "intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight",
    }  # fmt: skip
    shrink(encoder, cut)
    assert forward().shape == x.shape
    normed = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    cut = choose(normed, lambda: normed(torch.ones(2, 3)), squares(normed), ratio=0.5, round_to=1)
    shrink(normed, cut)
    assert normed(torch.ones(2, 3)).shape == (2, 2) and normed[1].normalized_shape == (4,)


def test_the_importance_decides_which_head_stays():
    """All heads alike but in the scores given."""
    model, ids = bert(), torch.randint(0, 50, (2, 5))
    scores = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    scores["bert.encoder.layer.0.attention.self.value.weight"][17] = 1  # head 2
    scores["bert.encoder.layer.0.attention.output.dense.weight"][:, 1] = 1  # head 0
    cut = choose(model, lambda: model(input_ids=ids).logits, scores, ratio=0.5)
    two = [*range(8), *range(16, 24)]
    assert kept(cut)["bert.encoder.layer.0.attention.self.key.weight"] == [(0, two)]


def test_a_cut_of_another_model():
    with pytest.raises(WrongShape, match=r"no 9\.weight"):
        shrink(conv_net(), Cut({"9.weight": ((0, torch.tensor([True, False])),)}, {}))
