"""What is measured: a run, an export of one, a Hugging Face folder or an ONNX file, all asked alike."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import hf, onnx_file, torch_file
from .footprint import random_batch, weight_bytes
from .runtimes import BACKENDS, Batch, LogitsFunction, compiled, eager, onnxruntime, sample
from .trained import AS_TRAINED, MANIFEST, WEIGHTS, CannotExport, Trained, find_run, manifest_of, open_run

if TYPE_CHECKING:
    from torch import nn

SHAPE = {"text": (1, 128), "image": (1,)}


@dataclass(frozen=True)
class MeasureTarget:
    """A model to measure. trained: the run whose data judges it. model: where torch can run it. onnx: the file."""

    name: str
    path: Path
    form: str
    trained: Trained | None
    model: nn.Module | None
    onnx: Path | None = None
    _scratch: list[Any] = field(default_factory=list, compare=False, repr=False)

    @property
    def bytes(self) -> int:
        """On disk, of the files that hold the weights."""
        return weight_bytes(self.path)

    def backends(self) -> tuple[str, ...]:
        """Return the backends that can run it."""
        return BACKENDS if self.model is not None else ("onnxruntime",)

    def logits_function(self, backend: str) -> LogitsFunction:
        """The model in one of `BACKENDS`; a torch model is exported for ONNX Runtime first."""
        if backend not in BACKENDS:
            raise CannotExport(f"--backend {backend}: there are {', '.join(BACKENDS)}.")
        if backend not in self.backends():
            raise CannotExport(f"--backend {backend}: {self.name} is an ONNX file, which only onnxruntime can run.")
        if backend == "onnxruntime":
            return onnxruntime(self.onnx or self._traced())
        assert self.model is not None
        return eager(self.model) if backend == "eager" else compiled(self.model)

    def batch(self, shape: Sequence[int]) -> Batch:
        """A batch of random tokens [rows, length], or of [rows] images of the run's data."""
        return random_batch(shape, self._like, self._vocabulary)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that latency is measured on by default: 128 tokens, or as many as the model takes, or one image."""
        if "input_ids" not in self._like:
            return SHAPE["image"]
        return 1, min(SHAPE["text"][1], onnx_file.longest(self.model))

    def _traced(self) -> Path:
        folder = tempfile.TemporaryDirectory(prefix="shoestring-onnx-")
        self._scratch.append(folder)  # removed with this object
        assert self.model is not None
        path = Path(folder.name) / onnx_file.NAME
        onnx_file.trace(self.model, onnx_file.model_inputs(self._like), path)
        return path

    @cached_property
    def _like(self) -> Batch:
        if self.trained is not None:
            return sample(self.trained, rows=2)
        two = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        like: Any = dict.fromkeys(["input_ids", *["decoder_input_ids"] * bool(two)])
        return random_batch((2, 8), like, self._vocabulary)

    @property
    def _vocabulary(self) -> int:
        if self.trained is not None and "vocab_size" in self.trained.task.facts:
            return int(self.trained.task.facts["vocab_size"])
        return int(getattr(getattr(self.model, "config", None), "vocab_size", 100))


def open_target(wanted: str, *, data: str | None = None, allow_code: bool = False) -> MeasureTarget:
    """Open what `wanted` names: a run (directory, id or name), an exported or a Hugging Face folder, or an .onnx file.

    data: the run on whose validation data it is judged; by default the one that it is, or was exported from.
    """
    path = Path(wanted)
    folder = path.parent if path.suffix == ".onnx" else path
    about = manifest_of(folder)
    if path.suffix == ".onnx" and not path.is_file():
        raise CannotExport(f"{wanted}: there is no such file.")
    if not path.exists() or (path / "run.json").exists():
        trained = open_run(wanted, allow_code=allow_code)
        other = open_run(data, allow_code=allow_code) if data else trained
        return MeasureTarget(wanted, trained.run_dir / WEIGHTS, "run", other, trained.model)
    known = data or about.get("run_dir")
    judge = open_run(known, allow_code=allow_code) if known else None
    if path.suffix == ".onnx" or about.get("to") == "onnx":
        file = path if path.suffix == ".onnx" else path / onnx_file.NAME
        return MeasureTarget(wanted, file, "onnx", judge, None, file)
    if about.get("to") == "torch":
        return MeasureTarget(wanted, path, "torch", judge, _torch(path, about, allow_code))
    if (path / "config.json").exists():
        return MeasureTarget(
            wanted, path, about.get("to", "hf"), judge, hf.load(path, about.get("task") or _kind(path))
        )
    raise CannotExport(f"{wanted} is no run, no Hugging Face folder (config.json), no ONNX file and no {MANIFEST}.")


def _torch(path: Path, about: dict[str, Any], allow_code: bool) -> nn.Module:
    trained = open_run(about["run_dir"], allow_code=allow_code)
    if about.get("quantize") == AS_TRAINED:
        trained = trained.as_trained()
    return torch_file.opened(trained.model, path / torch_file.NAME)


def _kind(folder: Path) -> str:
    import json

    names = json.loads((folder / "config.json").read_text()).get("architectures") or ["nothing"]
    from ..tasks.models import FORMS

    others = {"LMHeadModel": "causal-lm", "ForConditionalGeneration": "seq2seq", "MTModel": "seq2seq"}
    endings = {f"For{form}": kind for kind, form in FORMS.items()} | others
    for ending, kind in endings.items():
        if names[0].endswith(ending):
            return kind
    raise CannotExport(f"{folder} is a {names[0]}; ...{', ...'.join(endings)} can be measured.")


def home_of(wanted: str, data: str | None) -> Path | None:
    """The directory of the run that a measurement of `wanted` belongs to; None where it belongs to none."""
    if data is not None:
        return find_run(data)
    path = Path(wanted)
    about = manifest_of(path.parent if path.suffix == ".onnx" else path)
    if about.get("run_dir"):
        return Path(about["run_dir"])
    return find_run(wanted) if not path.exists() or (path / "run.json").exists() else None
