"""A base in few bits, made by one rank of a machine and mapped by all: which one it is, and how it is put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.cache import digest, file_digest
from .mapped_files import pages_given_back
from .quantized_loading import Keep, empty_quantized, fill, load_quantized, make_quantized
from .shared_weights import shared_model
from .weight_dtypes import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WRITTEN = "1"  # to be raised with any change of what the codes of a weight are


def pretrained_base(
    name: str, files: Iterable[Path], load: Callable[..., Any], new: Callable[[], Any], kept: Kept, cache: Path
) -> PreTrainedModel:
    """The model of the weights in `files`, as `load` reads it. new: makes one of the same shape with new weights."""
    from transformers import GenerationConfig

    kind = str(kept.codes)

    def make(keep: Keep) -> PreTrainedModel:
        with pages_given_back():
            model, found = load_quantized(load, kind, keep)
        model.drawn_weights = frozenset(found["missing_keys"])  # type: ignore[assignment]
        return model

    contents = [file_digest(file, cache) for file in files]
    model = _shared(cache, [*contents, _shape(empty_quantized(new, kind))], make, new, kept)
    model.drawn_weights = frozenset(name for name, p in model.named_parameters() if p.is_meta)
    fill(model)
    if model.can_generate():
        with suppress(OSError):  # it has none of its own
            model.generation_config = GenerationConfig.from_pretrained(name)
    return model


def new_base(make: Callable[[], Any], kept: Kept, cache: Path | None) -> PreTrainedModel:
    """What `make` makes, with new weights, its linear layers in few bits."""
    kind = str(kept.codes)
    if cache is None:
        return make_quantized(make, kind)
    drawn_from = torch.random.get_rng_state().numpy().tobytes()
    model = _shared(
        cache,
        [drawn_from, _shape(empty_quantized(make, kind))],
        lambda keep: make_quantized(make, kind, keep),
        make,
        kept,
    )
    fill(model)
    return model


def _shared(
    cache: Path, source: Iterable[str | bytes], make: Callable[[Keep], Any], new: Callable[[], Any], kept: Kept
) -> Any:
    import transformers

    about = (_WRITTEN, torch.__version__, transformers.__version__, str(kept.codes), kept.floats)
    folder = cache / "quantized" / digest([*source, *about])
    return shared_model(folder, make, lambda: empty_quantized(new, str(kept.codes)))


def _shape(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} {model.config.to_json_string()}"
