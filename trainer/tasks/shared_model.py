"""A model whose weights lie in a file that all ranks of a machine map: which one it is, and how it is put together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.cache import digest, file_digest
from .mapped_files import pages_given_back
from .quantized_loading import empty_model, fill, load_quantized, make_quantized
from .shared_weights import shared_model
from .weight_dtypes import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WRITTEN = "2"  # to be raised with any change of what the codes of a weight are, or where they lie


def pretrained_base(
    name: str, files: Iterable[Path], load: Callable[..., Any], new: Callable[[], Any], kept: Kept, home: Path,
    cache: Path,
) -> PreTrainedModel:  # fmt: skip
    """The model of the weights in `files`, as `load` reads it. new: makes one of the same shape with new weights.

    home: where its file is kept. cache: where sums of files are remembered.
    """
    from transformers import GenerationConfig

    def make() -> PreTrainedModel:
        with pages_given_back():
            model, loading_info = load() if kept.codes is None else load_quantized(load, kept.codes)
        model.drawn_weights = frozenset(loading_info["missing_keys"])
        return model  # type: ignore[no-any-return]

    contents = [file_digest(file, cache) for file in files]
    model = _shared(home, [*contents, _shape(empty_model(new, kept.codes))], make, new, kept)
    model.drawn_weights = frozenset(name for name, p in model.named_parameters() if p.is_meta)
    fill(model)
    if model.can_generate():
        with suppress(OSError):  # it has none of its own
            model.generation_config = GenerationConfig.from_pretrained(name)
    return model


def new_base(make: Callable[[], Any], kept: Kept, home: Path | None) -> PreTrainedModel:
    """What `make` makes, with new weights, its linear layers in 4 or 8 bits where `kept` says so. home: of its file."""
    whole = make if kept.codes is None else lambda: make_quantized(make, str(kept.codes))
    if home is None:
        return whole()
    drawn_from = torch.random.get_rng_state().numpy().tobytes()
    model = _shared(home, [drawn_from, _shape(empty_model(make, kept.codes))], whole, make, kept)
    fill(model)
    return model


def _shared(
    home: Path, source: Iterable[str | bytes], make: Callable[[], Any], new: Callable[[], Any], kept: Kept
) -> Any:
    import transformers

    about = (_WRITTEN, torch.__version__, transformers.__version__, str(kept.codes), kept.floats)
    return shared_model(home / digest([*source, *about]), make, lambda: empty_model(new, kept.codes))


def _shape(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} {model.config.to_json_string()}"
