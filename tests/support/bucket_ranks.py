"""What one of four ranks does in the tests of DDP's buckets: the same gradients, summed in several steps."""

import json
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shoestring.trainer.checkpoint.buckets import settle_buckets

WORLD, STEPS = 4, 3


def summed(ddp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    ddp.zero_grad()
    ddp(x).square().mean().backward()
    return torch.cat([p.grad.reshape(-1) for p in ddp.parameters()]).clone()


def model(**options: object) -> DistributedDataParallel:
    torch.manual_seed(3)
    layers = [nn.Linear(96, 96) for _ in range(4)]
    layers[0].register_buffer("seen", torch.zeros(3))
    return DistributedDataParallel(nn.Sequential(*layers), **options)


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(rank))
    differing = {}
    for name, settled, options in (
        ("plain", False, {}), ("settled", True, {}), ("unused", True, {"find_unused_parameters": True}),
    ):  # fmt: skip
        ddp = model(**options)
        before = torch.random.get_rng_state()
        if settled:
            with torch.no_grad():  # as where a model is reshaped
                settle_buckets(ddp, WORLD)
        left = [p.grad for p in ddp.parameters() if p.grad is not None]
        assert not left and torch.equal(before, torch.random.get_rng_state()), "nothing is left of it"
        sums = [summed(ddp, x) for _ in range(STEPS)]
        differing[name] = [int((sums[0] != later).sum()) for later in sums[1:]]
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(differing))
    dist.barrier()  # nobody goes while another still sums
