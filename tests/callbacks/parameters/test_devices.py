"""The accessor keeps to devices: the host's tensors in no collective, nothing mixed, nothing read too early."""

import json

import device_ranks
import pytest
import torch
from processes import succeed
from second_device import THERE, Elsewhere, There

CASES = [("zero2", "none"), ("zero2", "optimizer"), ("zero3", "none"), ("zero3", "parameters")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One rank, where NCCL refuses the host's tensors as on many; it holds nothing of one of the parameters."""
    folder = tmp_path_factory.mktemp("devices")
    succeed(device_ranks.main, CASES, folder, world=1, folder=folder)
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize(("strategy", "offload"), CASES)
def test_masks_and_sums_keep_to_the_device_of_the_masters(strategy, offload, ran):
    seen = ran[f"{strategy} {offload}"]
    home = str(THERE) if offload == "none" else "cpu"
    for kind in ("masters", "masks", "rows", "averaged"):
        assert seen[kind] == [home], kind
    assert (seen["gathered"], seen["summed"]) == (str(THERE), [3])
    assert seen["kept"].pop(device_ranks.ABSENT) == 0
    assert all(share == pytest.approx(0.5, abs=0.01) for share in seen["kept"].values())
    if offload != "none":
        assert seen["norms"] == [str(THERE)], "clipping sums norms on the engine's device"
    if (strategy, offload) == ("zero2", "optimizer"):
        assert seen["landed"], "a gradient was read while its copy was under way"


def test_the_second_device_refuses_what_a_gpu_would():
    with Elsewhere():
        there = There(torch.arange(3.0))
        assert (there + torch.tensor(1.0)).to("cpu").tolist() == [1.0, 2.0, 3.0]
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.zeros(()).add_(there.sum())
