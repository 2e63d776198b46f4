"""What computes a model's outputs: torch eager, torch.compile or ONNX Runtime, all called alike: batch -> logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...callbacks.sampling.seeding import seeded
from ..machine.facts import multiplies_bytes
from .trained import CannotExport, Trained

Batch = dict[str, Tensor]
LogitsFunction = Callable[[Batch], Tensor]  # a batch's tensors by name -> logits
BACKENDS = ("eager", "compile", "onnxruntime")
CPU = "shoestring.cpu"  # in an ONNX file's metadata: "vnni" where other CPUs compute its int8 products wrong, or "any"
EXACT = "session.x64quantprecision"  # lets ONNX Runtime take slower products that are right without VNNI
NOT_INPUTS = ("labels", "loss_weight", "reference", "wanted", "index")


def sample(trained: Trained, rows: int = 4) -> Batch:
    """The inputs of the first `rows` held-out samples (training samples where none are held out)."""
    data = trained.task.validation if trained.task.validation is not None else trained.task.train
    batch = next(_batches(trained, data, range(rows), rows))
    return {name: value[:rows] for name, value in batch.items()}


def calibration(trained: Trained, samples: int = 128, rows: int = 16) -> list[Batch]:
    """The inputs of so many training samples, drawn by the recipe's seed, in batches of `rows`.

    A user's datamodule gives the first ones of its loader, in its own batches.
    """
    seed, data = trained.recipe.seed, trained.task.train
    size = len(data) if data is not None else 0  # type: ignore[arg-type]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    batches: list[Batch] = []
    with seeded(seed):  # samples and loaders may be random
        for batch in _batches(trained, data, order, rows):
            batches.append(batch)
            if sum(len(next(iter(b.values()))) for b in batches) >= samples:
                break
    return batches


def _batches(trained: Trained, data: Any, order: Sequence[int], rows: int) -> Iterator[Batch]:
    """What a model is called with: the samples `order` of `data`, or where that is None the run's own batches."""
    task = trained.task
    if data is not None:
        collate: Any = task.collate
        order = [index for index in order if index < len(data)]
        batches = (collate([data[i] for i in order[at : at + rows]]) for at in range(0, len(order), rows))
    elif task.datamodule is not None:
        batches = iter(task.datamodule.train_dataloader())
    else:
        raise CannotExport(f"{trained.run_dir}: its recipe has no data to run the model on.")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise CannotExport(f"the data's batches are {type(batch).__name__}s; an export takes mappings of tensors.")
        yield inputs(batch)


def inputs(batch: Mapping[str, Tensor]) -> Batch:
    """The tensors of a batch that a model is called with; of pairs, each document is a row."""
    given = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    paired = "input_ids" in given and given["input_ids"].ndim == 3
    return {name: value.flatten(0, 1) for name, value in given.items()} if paired else given


def eager(model: nn.Module) -> LogitsFunction:
    """The module as it is, without gradients."""

    @torch.no_grad()  # in inference mode torch hides matrix products from the FLOP counter
    def run(batch: Batch) -> Tensor:
        out: Any = model(**batch)
        return getattr(out, "logits", out)

    return run


def compiled(model: nn.Module) -> LogitsFunction:
    """The module through torch.compile, one graph for each shape. Compilation happens in the first call."""
    # beyond 8 shapes of one code torch falls back to eager, silently
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return eager(torch.compile(model, dynamic=False))  # type: ignore[arg-type]


def onnxruntime(path: Path, threads: int | None = None) -> LogitsFunction:
    """An ONNX file in ONNX Runtime on the CPU, with as many threads as torch has. Inputs the graph lacks are left out,
    and an attention mask that the batch lacks is all ones."""
    session = open_session(path, threads or torch.get_num_threads())
    names = [given.name for given in session.get_inputs()]

    def run(batch: Batch) -> Tensor:
        if "attention_mask" in names and "attention_mask" not in batch:
            batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
        if lacking := [name for name in names if name not in batch]:
            raise CannotExport(f"{path} takes {', '.join(names)}; the data lacks {', '.join(lacking)}.")
        return torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0])

    return run


def open_session(path: str | Path, threads: int | None = None) -> Any:
    """An `InferenceSession` on the CPU. threads: of one operator; None leaves it to ONNX Runtime.

    Sum and layer norm stay two operators: ONNX Runtime's fused one takes three times as long as both on a CPU. Files
    for CPUs with VNNI are right on others too, but run at a third of the speed.
    """
    session = _session(path, threads)
    for_vnni = session.get_modelmeta().custom_metadata_map.get(CPU) == "vnni"
    return _session(path, threads, {EXACT: "1"}) if for_vnni and not multiplies_bytes() else session


def _session(path: str | Path, threads: int | None, config: Mapping[str, str] | None = None) -> Any:
    runtime: Any = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    return runtime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
    )


def needed(package: str) -> Any:
    """Import a package of the extra `compress`, or say how to get it."""
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        raise CannotExport(f"this needs {package}: pip install 'shoestring[compress]' ({error})") from None


def relative_error(logits: Tensor, wanted: Tensor, batch: Batch) -> float:
    """|found - wanted| / |wanted| (Frobenius), padding left out; inf where a shape differs or a value is not finite."""
    if logits.shape != wanted.shape:
        return float("inf")
    mask = None if "decoder_input_ids" in batch else batch.get("attention_mask")  # of a source
    if mask is not None and logits.ndim == 3:
        logits, wanted = logits[mask.bool()], wanted[mask.bool()]
    error = (logits.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    return float(error) if torch.isfinite(error) else float("inf")
