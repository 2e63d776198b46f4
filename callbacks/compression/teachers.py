"""Teachers: frozen models in evaluation mode that no optimizer, engine or checkpoint of the student's knows."""

from __future__ import annotations

import copy
import hashlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import ShoestringError
from ..forward.blocks import unwrap_copies

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # names of torch, and bytes
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NoTeacher(ShoestringError):
    """The teacher cannot be had, or cannot teach this student."""


def whole(p: Tensor) -> Tensor:
    """A parameter's elements, also where ZeRO-3 has cut it into pieces. Collective there."""
    if not hasattr(p, "ds_id"):
        return p.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([p]):
        return p.detach().clone()


def frozen_copy(module: nn.Module, dtype: torch.dtype, *, apart: bool) -> nn.Module:
    """A copy of `module` that does not train: parameters whole, without gradients, floats in `dtype`.

    apart: with storage of its own; otherwise tensors that are right as they are are shared. Buffers that are no part of
    the state (rotary frequencies) keep their precision. Hooks of our own techniques and of DeepSpeed stay behind, and
    so do a LightningModule's trainer and the tensors it keeps from its last step.
    """
    memo: dict[int, Any] = {}
    state = {id(t) for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(_cast(whole(p), dtype, apart), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = _cast(buffer.detach(), dtype if id(buffer) in state else buffer.dtype, apart)
    for part in module.modules():
        for name, value in vars(part).items():
            if name in ("_trainer", "_fabric"):
                memo[id(value)] = None
            elif isinstance(value, Tensor):
                memo.setdefault(id(value), value.detach())
    taught = copy.deepcopy(module, memo)
    unwrap_copies(taught)
    for part in taught.modules():
        part._parameters = dict(part._parameters)  # ZeRO-3's own kind of dictionary gathers what is looked up
        for kind in _HOOKS:
            hooks = vars(part)[kind]
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
    return taught.eval()


def _cast(tensor: Tensor, dtype: torch.dtype, apart: bool) -> Tensor:
    return tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=apart)


def _is_ours(hook: Any) -> bool:
    """A technique's, or the engine's that it trains in."""
    return str(getattr(hook, "__module__", "")).split(".")[0] in (__name__.split(".")[0], "deepspeed")


def load(name: str, dtype: torch.dtype) -> nn.Module:
    """A Hugging Face model from a local folder or the hub, as the architecture that its config names."""
    import transformers

    if name.startswith((".", "/", "~")) and not (Path(name).expanduser() / "config.json").exists():
        raise NoTeacher(f"teacher={name!r} has no config.json; give the folder of a saved Hugging Face model")
    path = str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kinds = [getattr(transformers, kind) for kind in config.architectures or () if hasattr(transformers, kind)]
        if not kinds:
            raise NoTeacher(f"teacher={name!r}: its config names no architecture of transformers")
        with torch.random.fork_rng(devices=[]):  # the student's random numbers stay as they are
            model = kinds[0].from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise NoTeacher(f"teacher={name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def check_outputs(student: nn.Module, teacher: nn.Module) -> None:
    """Raise `NoTeacher` where two Hugging Face models have outputs of different sizes: their classes are not the same.

    Nothing is known of other models before they run.
    """
    for ending, key in (("ForCausalLM", "vocab_size"), ("LMHeadModel", "vocab_size"), ("Classification", "num_labels")):
        mine, its = getattr(student, "config", None), getattr(teacher, "config", None)
        if mine is None or its is None or not type(student).__name__.endswith(ending):
            continue
        wanted, offered = getattr(mine, key, None), getattr(its, key, None)
        if isinstance(wanted, int) and isinstance(offered, int) and wanted != offered:
            raise NoTeacher(
                f"distillation: the teacher has {key} {offered} and the student {wanted}: their outputs are not of the "
                "same tokens or classes. Take a teacher with the student's vocabulary, or distil hidden states only: "
                "weight: 0 with hidden above 0."
            )


def fingerprint(module: nn.Module, *settings: object) -> str:
    """The same for the same weights, buffers and `settings`, in every process. Whole weights only."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Teacher:
    """Calls a frozen model without gradients, in its own precision; `forwards` counts how often."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module = module
        self.dtype = dtype
        self.forwards = 0
        self._engine: Any = None
        self._unlabelled = _takes_no_labels(module)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for the student's inputs; labels stay with the student."""
        self.forwards += 1
        if self._unlabelled:
            kwargs.pop("labels", None)
        inputs = [self._cast(value) for value in args]
        named = {name: self._cast(value) for name, value in kwargs.items()}
        device = next((v.device.type for v in (*inputs, *named.values()) if isinstance(v, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return (self._engine or self.module)(*inputs, **named)

    def _cast(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._cast(inner) for name, inner in value.items()}
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def to(self, device: torch.device) -> None:
        self.module.to(device)

    def shard(self) -> None:
        """Hand the weights to a DeepSpeed ZeRO-3 engine of their own: each rank keeps its part and gathers layers.

        Collective, like every call afterwards: all ranks must call alike. Parameters below DeepSpeed's
        `stage3_param_persistence_threshold` (100 000 elements) stay whole on every rank.
        """
        import deepspeed

        config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        if self.dtype != torch.float32:
            config["bf16" if self.dtype == torch.bfloat16 else "fp16"] = {"enabled": True}
        self._engine = deepspeed.initialize(model=self.module, config=config, dist_init_required=False)[0]
        self._engine.eval()

    def release(self) -> None:
        """Undo `shard`, whose hooks DeepSpeed keeps until told."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None


def _takes_no_labels(module: nn.Module) -> bool:
    """Whether `labels` may be left out, which saves the teacher a loss of its own."""
    labels = inspect.signature(module.forward).parameters.get("labels")
    return labels is not None and labels.default is None
