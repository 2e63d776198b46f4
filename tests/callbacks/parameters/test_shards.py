"""The accessor of sharded state on one device: views that write through, and wholes from slices."""

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from processes import succeed
from small import QUIET, Small, loader
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shoestring.callbacks.parameters.accessor import cut, shards_of
from shoestring.callbacks.parameters.fully_sharded import FullyShardedShards
from shoestring.callbacks.parameters.shards import NoShard, Shards, Slice

pytestmark = [pytest.mark.filterwarnings(warning) for warning in QUIET]


@pytest.fixture
def stepped():
    """A frozen and a trainable layer after one AdamW step, and the accessor to them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": [module[1].weight]}, {"params": [module[1].bias], "lr": 1.0}], lr=0.1)
    module(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    return module, optimizer, Shards(module, [optimizer])


def test_every_rank_holds_every_trainable_parameter_whole(stepped):
    _, _, shards = stepped
    assert shards.replicated and shards.at_boundary()
    assert shards.slices == {"1.weight": Slice(0, 8, torch.Size([2, 4])), "1.bias": Slice(0, 2, torch.Size([2]))}
    frozen = shards.frozen()
    assert {name: where.length for name, (where, _) in frozen.items()} == {"0.weight": 12, "0.bias": 4}


def test_views_write_through(stepped):
    module, optimizer, shards = stepped
    weight = module[1].weight
    shards.master("1.weight")[3] = 7.0
    assert weight[0, 3] == 7.0
    shards.gradient("1.weight").zero_()
    assert not weight.grad.any()
    shards.set_gradient("1.weight", torch.arange(8.0))
    assert torch.equal(weight.grad, torch.arange(8.0).view(2, 4))
    assert set(shards.state("1.weight")) == {"exp_avg", "exp_avg_sq"}
    shards.state("1.weight")["exp_avg"][0] = 5.0
    assert optimizer.state[weight]["exp_avg"][0, 0] == 5.0
    assert set(shards.scalars("1.weight")) == {"step"} and shards.scalars("1.weight")["step"] == 1
    shards.frozen()["0.bias"][1].fill_(2.0)
    assert (module[0].bias == 2.0).all()


def test_a_parameter_without_gradient_has_none_and_takes_none(stepped):
    module, _, shards = stepped
    module[1].bias.grad = None
    assert shards.gradient("1.bias") is None
    shards.set_gradient("1.bias", torch.ones(2))
    assert module[1].bias.grad is None


@pytest.mark.parametrize(("counts_there", "device"), [(True, "meta"), (False, "cpu")])
def test_the_count_of_steps_is_restored_to_where_the_optimizer_keeps_it(counts_there, device):
    """A fused or capturable optimizer counts on the device, any other on the host; "meta" is a second device."""
    module = nn.Linear(3, 4, bias=False, device="meta")
    optimizer = torch.optim.AdamW(module.parameters(), capturable=counts_there)
    moments = {"exp_avg": torch.zeros(12, device="meta"), "exp_avg_sq": torch.zeros(12, device="meta")}
    Shards(module, [optimizer]).restore("weight", moments, {"step": torch.tensor(3.0)})
    kept = optimizer.state[module.weight]
    assert kept["step"].device.type == device
    assert {kept[name].device.type for name in moments} == {"meta"}


def test_state_is_restored_where_the_optimizer_has_not_stepped_yet(stepped):
    module, _, shards = stepped
    state = {k: v.clone() for k, v in shards.state("1.weight").items()}
    scalars = shards.scalars("1.weight")
    fresh = torch.optim.AdamW(module[1].parameters(), lr=0.1)
    other = Shards(module, [fresh])
    other.restore("1.weight", state, scalars)
    for key, value in state.items():
        assert torch.equal(fresh.state[module[1].weight][key].view(-1), value)
        assert fresh.state[module[1].weight][key].data_ptr() != value.data_ptr()  # its own memory
    fresh.state[module[1].weight]["step"] += 1
    assert scalars["step"] == 1
    fresh.step()  # and it can go on


def test_whole_and_slice_are_inverse(stepped):
    module, _, shards = stepped
    assert torch.equal(shards.gather("1.weight", shards.master("1.weight")), module[1].weight)
    assert torch.equal(shards.total(torch.tensor([3])), torch.tensor([3]))
    where = Slice(2, 3, torch.Size([2, 4]))
    assert where.numel == 8
    assert torch.equal(where.cut(torch.arange(8).view(2, 4)), torch.tensor([2, 3, 4]))
    mask = torch.tensor([True, False]).repeat(4)
    assert torch.equal(shards.gather("1.weight", mask), mask.view(2, 4))


SILENT = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


class Peek(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        self.shards = shards_of(trainer, pl_module)
        assert shards_of(trainer, pl_module) is self.shards  # opened once
        whole = torch.arange(8.0).view(1, 8)
        assert torch.equal(cut(trainer, pl_module, {"net.weight": whole})["net.weight"], whole.view(-1))


def test_the_accessor_of_a_run_is_opened_once_and_belongs_to_its_model():
    peek, module = Peek(), Small()
    pl.Trainer(callbacks=[peek], max_steps=2, **SILENT).fit(module, loader())
    assert peek.shards.parameters["net.weight"] is module.net.weight
    assert peek.shards.state("net.weight")["exp_avg"].any()


def test_what_it_cannot_reach_it_says(tmp_path):
    """DTensors of another kind than FSDP2's, as tensor parallelism has them."""
    succeed(split_by_columns, tmp_path / "said", world=1, folder=tmp_path)
    said = (tmp_path / "said").read_text()
    assert "shape (4, 2) is" in said and "dim=1" in said and "what is split by rows alone" in said


def split_by_columns(said):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    columns = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,)), [Shard(1)])
    module = nn.Linear(2, 4, bias=False)
    module.weight = nn.Parameter(columns)
    with pytest.raises(NoShard) as refused:
        FullyShardedShards(module, [])
    said.write_text(str(refused.value))


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (None, "cpu")])
def test_a_restored_step_count_lies_where_the_optimizer_counts(fused, device):
    """A fused optimizer counts on the device of the parameter; `meta` is one that is not the host."""
    module = nn.Linear(2, 2, bias=False, device="meta")
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.param_groups[0]["fused"] = fused
    shards = Shards(module, [optimizer])
    shards.restore("weight", {"exp_avg": torch.ones(4)}, {"step": torch.tensor(3.0)})
    assert optimizer.state[module.weight]["step"].device.type == device
    assert optimizer.state[module.weight]["exp_avg"].device.type == "meta"
