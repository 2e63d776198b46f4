"""Models with low-bit weights: served as trained, smaller, and close to the original."""

import io

import pytest
import pytorch_lightning as pl
import torch
from int8_file import int8_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shoestring.callbacks import QuantizationAware
from shoestring.callbacks.compression.fake_quantization import BadGroups, fake_quantize_tokens, quantized
from shoestring.trainer.export.quantize import CannotQuantize, Int8Embedding, bake, quantize
from shoestring.trainer.export.runtimes import onnxruntime
from shoestring.trainer.export.trained import CannotExport

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of exporters and compilers
]


class Net(pl.LightningModule):
    """Embedding, two linear layers on tokens, one on sentences."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 64)
        self.wide, self.narrow, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 5)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.narrow(torch.relu(self.wide(x)))
        return self.head(x.mean(1))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class Fixed(pl.Callback):
    """What the model in training answers after the last step, as its technique shows it."""

    def __init__(self, ids):
        self.ids = ids

    def on_train_end(self, trainer, pl_module):
        pl_module.eval()
        with torch.no_grad():
            self.answers = pl_module(self.ids)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 50, (16, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained(ids):
    """(the model after W8A8 training with its head left alone, what it answered while quantized)."""
    labels = ids.sum(1) % 5
    net, fixed = Net(), Fixed(ids)
    pl.Trainer(
        accelerator="cpu", max_steps=40, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[QuantizationAware(activation_bits=8, skip=["head.*"]), fixed],
    ).fit(net, DataLoader(TensorDataset(ids, labels), batch_size=8))  # fmt: skip
    return net.eval(), fixed.answers


def off(actual, expected):
    """Relative error: |found - expected| / |expected|."""
    return float((actual - expected).norm() / expected.norm())


# -- served as trained -------------------------------------------------------------------------------------------------
def test_torchao_computes_what_was_trained(trained, ids):
    """The same codes for weights and tokens: equal but for the order of sums and ties in rounding."""
    net, answers = trained
    served = quantize(net, 8, 8, skip=["head.*"], compiled=False)
    assert off(served(ids), answers) < 1e-3 < off(net(ids), answers)
    assert type(served.wide.weight).__name__ == "Int8Tensor" and type(served.head.weight) is nn.Parameter
    assert isinstance(net.wide.weight, nn.Parameter) and net.wide.weight.dtype == torch.float32


def test_torchao_compiled_computes_the_same(trained, ids):
    net, answers = trained
    with torch.no_grad():
        assert off(quantize(net, 8, 8, skip=["head.*"])(ids), answers) < 1e-3


@pytest.fixture(scope="module")
def opened(trained, ids, tmp_path_factory):
    """(the file, what it computes of ids)."""
    path = tmp_path_factory.mktemp("onnx") / "int8.onnx"
    run = int8_file(trained[0], {"ids": ids}, path, skip=["head.*"], embeddings=True)
    return path, lambda ids: run({"ids": ids})


def test_onnx_runtime_computes_nearly_what_was_trained(trained, opened, ids):
    """Its tokens share one scale and a zero point: within 1 %, which is as far as rounding to 8 bits goes at all."""
    answers, (_, run) = trained[1], opened
    assert off(run(ids), answers) < 0.01
    assert off(run(ids[:3]), answers[:3]) < 0.01, "any number of sentences"
    assert (run(ids).argmax(1) == answers.argmax(1)).float().mean() >= 0.9


def test_the_onnx_file_holds_bytes(opened):
    import onnx

    graph = onnx.load(str(opened[0])).graph
    kinds = {tuple(i.dims): i.data_type for i in graph.initializer if len(i.dims) == 2}
    int8, float32 = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT
    assert kinds[64, 128] == kinds[128, 64] == kinds[50, 64] == int8
    assert kinds[64, 5] == float32, "the head was left out"
    products = sorted(n.op_type for n in graph.node if n.op_type.startswith("MatMul"))
    assert products == ["MatMul", "MatMulInteger", "MatMulInteger"]


def test_onnx_codes_are_those_of_training(trained, opened):
    import onnx

    graph = onnx.load(str(opened[0])).graph
    held = {tuple(i.dims): onnx.numpy_helper.to_array(i) for i in graph.initializer if i.data_type == 3}
    weight = trained[0].wide.weight.detach()
    expected = (weight / weight.abs().amax(1, keepdim=True) * 63).round().T
    assert (torch.tensor(held[64, 128]) == expected).float().mean() > 0.999


def test_missing_inputs_are_named(opened):
    with pytest.raises(CannotExport, match="takes ids; the data lacks ids"):
        onnxruntime(opened[0])({})


# -- after training ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (3, 16), (2, 16)])
@pytest.mark.parametrize("scale", ["absmax", "mse"])
def test_weight_only_is_the_grid_of_training(bits, group, scale, ids):
    net = Net()
    served = quantize(net, bits, None, group, scale=scale)
    baked = Net()
    assert bake(baked, bits, group, scale=scale) == ["wide.weight", "narrow.weight", "head.weight"]
    assert torch.equal(baked.wide.weight, quantized(net.wide.weight, bits, group, scale))
    assert off(served(ids), baked(ids)) < 1e-6
    levels = served.wide.weight.qdata.unique()
    assert len(levels) <= 2**bits - 1 and levels.dtype == torch.int8


def test_fewer_bits_are_further_off(ids):
    net = Net()
    errors = [off(quantize(net, bits, None, 16, scale="mse")(ids), net(ids)) for bits in (8, 4, 3, 2)]
    assert errors == sorted(errors) and errors[0] < 0.01 and errors[-1] > 0.1


def test_bytes_of_a_saved_model():
    """Four bytes a weight become one, and one float a row."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(1000, 256), nn.Linear(256, 1024), nn.Linear(1024, 256))

    def size(model):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return file.tell()

    assert 3.8 < size(net) / size(quantize(net, 8, 8, embeddings=True, compiled=False)) < 4.0
    assert 2.0 < size(net) / size(quantize(net, 8, 8, compiled=False)) < 3.0, "with the table in floats"


def test_a_pruned_model_keeps_its_zeros(ids):
    net = Net()
    with torch.no_grad():
        net.wide.weight[torch.rand_like(net.wide.weight) < 0.9] = 0
    for activations in (8, None):
        code = quantize(net, 8, activations, compiled=False).wide.weight.qdata
        assert ((code == 0) >= (net.wide.weight == 0)).all() and (code != 0).any()


def test_convolutions_and_shared_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 32), nn.Linear(32, 32))
    net[3].weight = net[2].weight
    x = torch.randn(2, 3, 4, 4)
    for activations in (None, 8):
        served = quantize(net, 4, activations, compiled=False)
        assert served[2].weight is served[3].weight
        conv = nn.functional.conv2d(x, quantized(net[0].weight, 4), net[0].bias)
        assert torch.allclose(served[0](x), conv, atol=1e-6)
    tokens = conv.flatten(1).abs()  # the largest of a token, where negative, lies between two codes
    expected = nn.functional.linear(fake_quantize_tokens(tokens), quantized(net[2].weight, 4), net[2].bias)
    assert off(served[2](tokens), expected) < 1e-3


def test_an_embedding_by_hand():
    table = torch.tensor([[1.27, -0.5], [0.0, 0.0], [12.7, 0.04]])
    embedding = Int8Embedding(table)
    expected = torch.tensor([[1.27, -0.5], [0.0, 0.0], [12.7, 0.0]])
    assert torch.allclose(embedding(torch.tensor([[0, 1, 2]])), expected[None], atol=1e-6)
    tied = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    tied["head"].weight = tied["embed"].weight
    with pytest.raises(CannotQuantize, match="nothing to quantize"):
        quantize(tied)


def test_errors_say_what_is_allowed():
    net = Net()
    for wrong, words in (
        ({"weight_bits": 1}, "weight_bits=1 is not allowed; use 2 to 8"),
        ({"activation_bits": 4}, "activation_bits=4 is not allowed"),
        ({"group_size": 32}, "group_size=32 with activation_bits=8"),
        ({"scale": "max"}, r"use absmax \| mse"),
        ({"skip": ["*"]}, "nothing to quantize"),
    ):
        with pytest.raises(CannotQuantize, match=words):
            quantize(net, **wrong)
    with pytest.raises(BadGroups, match=r"wide\.weight has 64 inputs"):
        quantize(net, 4, None, 48)
    with pytest.raises(CannotQuantize, match=r"skip=\['0\.weight'\]"):
        quantize(nn.Sequential(nn.Conv1d(2, 2, 2)), 4, None)
