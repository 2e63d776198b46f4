"""Hugging Face models for a recipe: pretrained by name or path, or new from a config.

Attention is `sdpa` wherever the model has it, unless the recipe names another, and `use_cache` is off: with a cache,
packed documents see each other (transformers 5), and training has no use for one. Weights are in the dtype that they
are to be kept in from the start, read from the memory-mapped file one by one; what a checkpoint was saved in does not
matter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.carried import resolve_name as resolve_name
from ..data.errors import TaskError, unknown
from ..data.paths import model_folder
from .mapped_files import all_kept_in, pages_given_back, read_from_files, weight_files
from .positions import first_position
from .weight_dtypes import FLOAT32, Kept

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ...recipes.model_schema import ModelSpec

# `model.attention` -> transformers' name
ATTENTIONS = {"sdpa": "sdpa", "flash": "flash_attention_2", "flex": "flex_attention", "eager": "eager"}
# task -> what transformers calls models for it
FORMS = {
    "causal-lm": "CausalLM", "masked-lm": "MaskedLM", "seq2seq": "Seq2SeqLM",
    "sequence-classification": "SequenceClassification", "token-classification": "TokenClassification",
    "image-classification": "ImageClassification",
}  # fmt: skip
LABELLED = ("sequence-classification", "token-classification")  # texts whose models have an output for each label
# spellings that configs accept beside their fields (transformers translates them)
ALSO_ACCEPTED = frozenset({"rope_theta", "rope_scaling", "attn_implementation", "decoder_start_token_id"})


def build_model(
    model: Any,
    task: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    sequence_length: int,
    classes: Sequence[str] | None = None,
    kept: Kept = FLOAT32,
    cache: Path | None = None,
    passing: Path | None = None,
) -> PreTrainedModel:
    """A model for `task` (one of `FORMS`), its sizes checked against the data's.

    model: the recipe's model section. tokenizer: None where a user's own data brings token numbers. classes: names of
    the classes, in the order of their numbers. kept: what its weights are kept in. cache: where
    the base of an adapter is kept for all ranks and later starts, unless its files already hold what is kept. passing:
    where all other weights lie until somebody takes them from there; None: in memory. Raises `TaskError` where the
    model cannot be had, does not fit the task, or is too small for the vocabulary or the length.
    """
    labels = _label_settings(classes, model.problem) if task in LABELLED else {}
    if model.attention in ("flash", "flex") and not torch.cuda.is_available():
        raise TaskError(f"model.attention: {model.attention} needs a CUDA device; on a CPU there are sdpa and eager.")
    again = kept.codes is not None or (model.adapter is not None and kept.floats == "bf16")
    home = cache / "bases" if again and cache is not None else passing
    if model.name is not None:
        name = model_folder(resolve_name(model.name), "model.name")
        built = _pretrained(name, task, labels, kept, model.attention, home, cache or passing)
    else:
        built = _from_config(model_config(model.config, task, tokenizer, labels), task, kept, model.attention, home)
    _check_sizes(built, tokenizer, sequence_length)
    built.config.use_cache = False
    if tokenizer is not None:
        built.config.pad_token_id = tokenizer.pad_token_id  # what rows are padded with
    return built.train()  # a pretrained model comes in evaluation mode, its dropout off


def build_image_form(model: ModelSpec, shape: tuple[int, ...], classes: Sequence[str]) -> PreTrainedModel:
    """A Hugging Face model for images of `shape` [C, H, W], by the recipe's model section. Raises `TaskError`."""
    task, labels = "image-classification", _label_settings(classes, "single-label")
    if model.name is not None:
        name = model_folder(resolve_name(model.name), "model.name")
        built = _pretrained(name, task, labels, FLOAT32, model.attention, None, None)
    else:
        keys = _config_keys(_config_class(model.config or {}, task))
        given = {"image_size": shape[1], "num_channels": shape[0]}
        fields = {**{key: value for key, value in given.items() if key in keys}, **(model.config or {})}
        built = _from_config(model_config(fields, task, None, labels), task, FLOAT32, model.attention, None)
    wanted = getattr(built.config, "image_size", None)
    if isinstance(wanted, int) and wanted != shape[1]:
        raise TaskError(f"data.image_size: images are {shape[1]} pixels wide, and the model takes {wanted}.")
    return built.train()


def model_config(
    fields: dict[str, Any], task: str, tokenizer: PreTrainedTokenizerBase | None, labels: dict[str, Any]
) -> PreTrainedConfig:
    """A transformers config from a recipe's `model.config`: unknown types and keys are errors.

    `vocab_size` and the special tokens' numbers default to the tokenizer's.
    """
    from transformers import AutoConfig

    allowed = _config_keys(_config_class(fields, task))
    fields = dict(fields)
    kind = fields.pop("model_type")
    for key in fields:
        if key not in allowed:
            raise unknown(f"model.config of {kind}", key, allowed)
    try:
        given = {**_vocabulary(tokenizer, task), **labels, **_direction(task, allowed), **fields}
        return AutoConfig.for_model(kind, **given)
    except Exception as error:  # transformers' strict types, ValueErrors of single models
        raise TaskError(f"model.config of {kind}: {' '.join(str(error).split())}") from error


def _config_class(fields: dict[str, Any], task: str) -> type[PreTrainedConfig]:
    """Of the `model_type` among a config's fields; raises `TaskError` for one that the task has no form of."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = fields.get("model_type")
    if kind not in _model_types(task):
        raise unknown(f"model.config.model_type for task {task}", kind, _model_types(task))
    return CONFIG_MAPPING[kind]  # type: ignore[no-any-return]


def _direction(task: str, keys: Iterable[str]) -> dict[str, bool]:
    """What makes an encoder, such as BERT, causal: its tokens then see those before them alone."""
    return {"is_decoder": True} if task == "causal-lm" and "is_decoder" in keys else {}


def _pretrained(
    name: str, task: str, labels: dict[str, Any], kept: Kept, attention: str, home: Path | None, cache: Path | None
) -> PreTrainedModel:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type not in _model_types(task):
            raise TaskError(f"model.name {name!r} is a {config.model_type}, which transformers has no {task} form of.")
        settings = {**labels, **_direction(task, vars(config))}
        load = _loading(name, task, settings, kept, attention)
        files = [] if home is None else weight_files(name)
        as_read = all_kept_in(files, kept) and not _merged(config.model_type)
        if home is not None and cache is not None and files and not as_read:
            from .shared_model import pretrained_base

            config = AutoConfig.from_pretrained(name, **settings)
            new = partial(_with_attention, attention, auto_class(task).from_config, config, dtype=kept.dtype)
            with _quietly():
                return pretrained_base(name, files, load, new, kept, home, cache)
        with _quietly(), pages_given_back():
            if kept.codes is None:
                model, loading_info = load()
            else:
                from .quantized_loading import load_quantized

                model, loading_info = load_quantized(load, kept.codes)
        model.drawn_weights = frozenset(loading_info["missing_keys"])  # a new head: no file gives it again
        for p in read_from_files(model.parameters()):
            p.mapped = True  # type: ignore[attr-defined]
        return model  # type: ignore[no-any-return]
    except TaskError:
        raise
    except (OSError, ValueError) as error:
        raise TaskError(f"model.name: cannot load {name!r}: {str(error).splitlines()[0]}") from error


def show_weights_of(
    model: ModelSpec, task: str, show: Callable[[str, torch.Tensor], None], *, classes: Sequence[str] | None, kept: Kept
) -> None:
    """Read a pretrained model again that `build_model` has built with weights in codes, and show what these were of.

    show: gets the path and the weight [out, in] of each layer in codes, one after another; none of them is kept.
    """
    from .quantized_loading import show_weights

    labels = _label_settings(classes, model.problem) if task in LABELLED else {}
    name = model_folder(resolve_name(str(model.name)), "model.name")
    with _quietly(), pages_given_back():
        show_weights(_loading(name, task, labels, kept, model.attention), str(kept.codes), show)


def _loading(name: str, task: str, settings: dict[str, Any], kept: Kept, attention: str) -> Any:
    """What loads a pretrained model, and tells what its files had."""
    make: Any = partial(_with_attention, attention, auto_class(task).from_pretrained, name, **settings)
    return partial(make, output_loading_info=True, dtype=kept.dtype)


def _from_config(config: PreTrainedConfig, task: str, kept: Kept, attention: str, home: Path | None) -> PreTrainedModel:
    try:
        make = partial(_with_attention, attention, auto_class(task).from_config, config, dtype=kept.dtype)
        if kept.codes is None and home is None:
            return make()
        from .shared_model import new_base

        return new_base(make, kept, home)
    except (ValueError, TypeError, AssertionError) as error:  # sizes that do not divide, and the like
        raise TaskError(f"model.config of {config.model_type}: {error}") from error


def _merged(model_type: str) -> bool:
    """Whether weights of the model are put together from several of its files, as those of experts are."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(each, WeightConverter) for each in get_checkpoint_conversion_mapping(model_type) or ())


@contextmanager
def _quietly() -> Iterator[None]:
    """No bar for a load of a second, no warning that the new classification head is new: it was asked for."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _with_attention(attention: str, load: Any, *args: Any, **settings: Any) -> Any:
    try:
        return load(*args, attn_implementation=ATTENTIONS.get(attention, "sdpa"), **settings)
    except (ValueError, ImportError) as error:
        if attention != "auto" and any(word in str(error) for word in ("attention", "attn")):
            raise TaskError(f"model.attention: {attention} is not to be had: {str(error).splitlines()[0]}") from error
        if attention != "auto" or "scaled_dot_product_attention" not in str(error):
            raise
        return load(*args, attn_implementation="eager", **settings)


def auto_class(task: str) -> Any:
    """Transformers' class that makes a model for a task."""
    import transformers

    return getattr(transformers, f"AutoModelFor{FORMS[task]}")


def _model_types(task: str) -> set[str]:
    from transformers.models.auto import modeling_auto

    return set(getattr(modeling_auto, f"AutoModelFor{FORMS[task]}")._model_mapping._model_mapping)


def _config_keys(config: type[PreTrainedConfig]) -> set[str]:
    own = set(inspect.signature(config.__init__).parameters) - {"self", "kwargs"}
    return own | set(config.attribute_map) | ALSO_ACCEPTED


def _vocabulary(tokenizer: PreTrainedTokenizerBase | None, task: str) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    start = {"decoder_start_token_id": tokenizer.pad_token_id} if task == "seq2seq" else {}
    return {"vocab_size": len(tokenizer), **ids, **start}


def _label_settings(classes: Sequence[str] | None, problem: str) -> dict[str, Any]:
    if problem == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    kind = {"problem_type": "multi_label_classification"} if problem == "multi-label" else {}
    names = list(classes or ())
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}, **kind}


def _check_sizes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, sequence_length: int) -> None:
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if tokenizer is not None and rows < len(tokenizer):
        raise TaskError(
            f"the model has {rows} embeddings and the tokenizer {len(tokenizer)} tokens. "
            "Leave model.config.vocab_size out, or use the tokenizer that belongs to the model."
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    skipped = first_position(model)
    if sequence_length > limit - skipped:
        less = f" less the {skipped} that its {model.config.model_type} family leaves unused" if skipped else ""
        raise TaskError(
            f"data.sequence_length {sequence_length} is above the model's max_position_embeddings {limit}{less}."
        )
