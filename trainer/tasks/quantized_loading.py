"""Models of Hugging Face whose linear layers are quantized one by one, while they are read or made.

No more than one layer is ever there in full beside what is kept: pretrained weights come from the memory-mapped file
through transformers' own interface for quantizers, so that its renaming and merging of tensors holds here too; a new
model is made on the meta device and filled layer by layer. Embeddings, the output layer and norms are not quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.errors import TaskError
from .quantized import CODECS, QuantizedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_METHOD = "shoestring"
_HEADS = ("classifier", "score")  # which PEFT trains beside adapters


def load_quantized(load: Callable[..., tuple[PreTrainedModel, Any]], kind: str) -> tuple[PreTrainedModel, Any]:
    """What `load` loads, a `from_pretrained` that tells what it has found, with its linear layers in `kind`."""
    config_class, quantizer = _registered()
    model, loading_info = load(quantization_config=config_class(kind))
    quantizer.remove_quantization_config(model)  # the model is saved merged, and in full
    for path, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear) and f"{path}.weight" in loading_info["missing_keys"]:
            model.set_submodule(path, _drawn(layer, model))
    return _checked(model), loading_info


def show_weights(
    load: Callable[..., tuple[PreTrainedModel, Any]], kind: str, show: Callable[[str, Tensor], None]
) -> None:
    """Read what `load_quantized` reads once more: `show` gets the path and the weight of each layer that it quantizes.

    One after another, as they are before they become codes; none is kept. Those that no file has are not shown.
    """
    config_class, _ = _registered()
    with torch.random.fork_rng(devices=[]):  # for new heads, which are drawn and thrown away
        load(quantization_config=config_class(kind, show))


def make_quantized(make: Callable[[], PreTrainedModel], kind: str) -> PreTrainedModel:
    """What `make` makes, a model with new weights, with its linear layers in `kind`."""
    model, skipped = _on_meta(make)
    _fill(model, model, "", lambda name, layer: _quantizes(name, layer, skipped), kind)
    model.tie_weights()
    return _checked(model)


def empty_model(make: Callable[[], PreTrainedModel], kind: str | None) -> PreTrainedModel:
    """What `make` makes, on the meta device, with its linear layers in `kind`. `fill` gives it what it lacks."""
    model, skipped = _on_meta(make)
    if kind is None:
        return model
    for path, layer in list(model.named_modules()):
        if _quantizes(path, layer, skipped):
            model.set_submodule(path, QuantizedLinear(layer, kind))  # type: ignore[arg-type]
    return _checked(model)


def fill(model: PreTrainedModel) -> None:
    """Draw and compute what a model still has on the meta device: new heads, and buffers that no file has."""
    model.tie_weights()
    _fill(model, model, "", lambda name, layer: False, "")


def _on_meta(make: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, list[str]]:
    with torch.device("meta"):
        model = make()
    return model, _kept_whole(model)


def _drawn(layer: QuantizedLinear, owner: Any) -> QuantizedLinear:
    """The layer with weights as a new model has them: those of a new head, which no file gives."""
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    with torch.no_grad():
        owner._initialize_weights(plain)
    return QuantizedLinear(plain if layer.bias is None else plain.to(layer.bias.dtype), layer.kind)


def _checked(model: PreTrainedModel) -> PreTrainedModel:
    if not any(isinstance(part, QuantizedLinear) for part in model.modules()):
        raise TaskError(
            f"model.dtype: a {model.config.model_type} has no linear layers to quantize (transformers' Conv1D are not "
            "among them). Use bf16."
        )
    return model


def _kept_whole(model: PreTrainedModel) -> list[str]:
    """The output layer, the head of a classifier, which is trained, and whatever transformers never quantizes."""
    from transformers.quantizers.base import HfQuantizer

    heads = [name for name in _HEADS if hasattr(model, name)]
    return heads + list(HfQuantizer.get_modules_to_not_convert(model, None, list(model._keep_in_fp32_modules or ())))


def _quantizes(name: str, layer: nn.Module, skipped: list[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return type(layer) is nn.Linear and should_convert_module(name, skipped)


def _fill(
    module: nn.Module,
    owner: Any,
    path: str,
    wanted: Callable[[str, nn.Module], bool],
    kind: str,
) -> None:
    """Give a module on the meta device its weights, children first, and quantize each child once it has them."""
    from transformers import PreTrainedModel

    for name, child in list(module.named_children()):
        where = f"{path}.{name}" if path else name
        if isinstance(child, QuantizedLinear):
            if child.weight.is_meta:
                setattr(module, name, _drawn(child, owner))
            continue
        _fill(child, child if isinstance(child, PreTrainedModel) else owner, where, wanted, kind)
        if wanted(where, child):
            setattr(module, name, QuantizedLinear(child, kind))  # type: ignore[arg-type]
    for name, p in module._parameters.items():
        if p is not None and p.is_meta:
            module._parameters[name] = nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_meta:
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
    with torch.no_grad():
        owner._initialize_weights(module)


def _in_codes(model: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    return last == "weight" and isinstance(model.get_submodule(path), QuantizedLinear)


_classes: list[tuple[Any, Any]] = []


def _registered() -> tuple[Any, Any]:
    """Our configuration and our quantizer in transformers' terms, registered on first use."""
    if not _classes:
        _classes.append(_register())
    return _classes[0]


def _register() -> tuple[Any, Any]:
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config(_METHOD)
    class Config(QuantizationConfigMixin):
        def __init__(self, kind: str = "nf4", show: Callable[[str, Tensor], None] | None = None, **about: Any) -> None:
            self.quant_method: Any = _METHOD
            self.kind, self.show = kind, show

    class Quantize(ConversionOps):
        def __init__(self, kind: str, show: Callable[[str, Tensor], None] | None) -> None:
            self.kind, self.show = kind, show

        def convert(
            self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **about: Any
        ) -> dict[str, Any]:
            names = (
                [about["full_layer_name"]] if len(input_dict) == 1 else list(input_dict)
            )  # of a fused weight's parts
            made: dict[str, Any] = {}
            for name, loaded in zip(names, input_dict.values(), strict=True):
                weight, path = loaded[0] if isinstance(loaded, list) else loaded, name.removesuffix(".weight")
                in_codes = _in_codes(about["model"], name)
                if self.show is not None:
                    if in_codes:
                        self.show(path, weight)
                    weight = weight.to("meta")
                parts = CODECS[self.kind].parts(weight) if in_codes else {}
                made |= {f"{path}.{part}": code for part, code in parts.items()} or {name: weight}
            return made

    @register_quantizer(_METHOD)
    class Quantizer(HfQuantizer):
        quantization_config: Any

        def param_needs_quantization(self, model: Any, param_name: str, **about: Any) -> bool:
            return self.quantization_config.show is not None or _in_codes(model, param_name)

        def _process_model_before_weight_loading(self, model: Any, **about: Any) -> Any:
            skipped = _kept_whole(model)
            for path, layer in list(model.named_modules()):
                if _quantizes(path, layer, skipped):
                    model.set_submodule(path, QuantizedLinear(layer, self.quantization_config.kind))
            for layer in model.modules():
                if isinstance(layer, QuantizedLinear):
                    layer._is_hf_initialized = True  # type: ignore[assignment]  # codes are not drawn as weights are
            return model

        def get_quantize_ops(self) -> Any:
            config = self.quantization_config
            return Quantize(config.kind, config.show)

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    return Config, Quantizer(Config(), pre_quantized=False)
