"""A device that is not the host, where there is none: tensors that lie `there` refuse what a GPU would refuse.

They say that they are on `ipu:0`, carry their values all the same, and mix with no tensor of the host but a number.
While `Elsewhere` is entered, collectives take tensors from there only, as NCCL does.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

THERE = torch.device("ipu:0")  # of a kind that torch initializes nothing for


class There(Tensor):
    """A tensor of the second device; `values` are its own, on the host."""

    @staticmethod
    def __new__(cls, values: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device="meta",  # to torch's own code, which has no other one that it need not initialize
        )  # fmt: skip

    def __init__(self, values: Tensor) -> None:
        self.values_here = values

    @property
    def device(self) -> torch.device:
        return THERE

    def tolist(self) -> list:
        return self.values_here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Makes what is asked for on the second device, and forbids the host's tensors in collectives."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=THERE) is made here, and then sent there
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


def _call(func, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    remote = [x for x in tensors if isinstance(x, There)]
    name, in_place = func.overloadpacket.__name__, func._schema.is_mutable
    if func.namespace == "c10d" and len(remote) < len(tensors):
        raise RuntimeError(f"No backend type associated with device type cpu ({name})")
    crosses = name in ("copy_", "_to_copy")
    if remote and not crosses:
        host = [x for x in tensors if not isinstance(x, There) and (x.ndim or (in_place and x is args[0]))]
        if host:
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {THERE} and cpu")
    device = kwargs.get("device")
    stays = device == THERE or (device is None and bool(remote))
    if name == "copy_":
        stays = isinstance(args[0], There)
    if device == THERE:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain_args, plain_kwargs = tree_map_only(There, lambda x: x.values_here, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    if in_place and isinstance(result, Tensor):
        return args[0]
    return tree_map_only(Tensor, There, result) if stays else result
