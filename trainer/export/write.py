"""Export a trained model: write it, load it from the disk in the runtime it is for, compare, and only then keep it.

    format                  what is compared                                       largest relative error
    hf, gguf-ready          transformers' reload with the model in memory          0
    torch                   the reload with the model, rounded the same in memory  0
    onnx                    ONNX Runtime with the model in memory                  1e-4
    peft                    PEFT's reload, on the base, with the model in memory   1e-5
    gguf                    transformers' reload, dequantized, with the model      1e-5; float16 5e-3, q8_0 5e-2
    onnx --quantize int8    ONNX Runtime with the emulation of its arithmetic      2e-2

In ONNX files "int8" has weights within 7 bits, which every CPU multiplies right; "int8-vnni" has all 8, half the
rounding error, and is for CPUs with VNNI, or Arm: others compute something else from it.
`--quantize trained` stores what `quantization_aware` and `weight_clustering` have trained the weights to be: torch
packs their bits; hf has floats of the same values, for those who evaluate; onnx, after training for 8-bit activations,
int8 products of them, for the CPUs that `quantization_aware` was told. Everything else stays in floats.

The relative error is |found - wanted| / |wanted| over the outputs of up to four held-out samples. What is not quantized
is compared with the model that the run has evaluated, too, adapters apart: by its loss on these samples.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...callbacks.compression.fake_quantization import PRODUCT_BITS
from . import gguf_file, hf, model_card, onnx_file, peft_file, torch_file
from .encodings import Codebook, Grid
from .quality import quality
from .runtimes import LogitsFunction, eager, relative_error, sample
from .trained import AS_TRAINED, BEST, MANIFEST, CannotExport, Trained, manifest_of

FORMATS = ("hf", "torch", "onnx", "gguf", "gguf-ready-safetensors", "peft")
QUANTIZED = {
    "torch": ("int8", "int4", "float16", "bfloat16", AS_TRAINED), "onnx": ("int8", "int8-vnni", AS_TRAINED),
    "hf": (AS_TRAINED,), "gguf": ("float16", "q8_0"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An export that has been read back and compared. Bytes are those of all files in the folder, as they lie there.

    error: largest relative error found against `tolerance`, relative to the model in memory that has the same
    quantization; from_original: the same against the trained model as it was.
    """

    path: str
    to: str
    quantize: str | None
    sparse: bool
    bytes: int
    files: dict[str, int]
    error: float
    tolerance: float
    from_original: float
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Format:
    """One format: how it is written, loaded again, and what it is compared with."""

    write: Callable[[Path], list[str]]
    reload: Callable[[Path], LogitsFunction]
    expected: Callable[[], LogitsFunction]
    tolerance: float


def export(
    trained: Trained, to: str, *, out: Path | None = None, quantize: str | None = None, sparse: bool = False,
    traced: Path | None = None, license: str | None = None,
) -> Exported:  # fmt: skip
    """Write `trained` in one of `FORMATS` to the folder `out` (default: run_dir/export/<format>).

    traced: for onnx, an ONNX file of this very model in float32, which spares tracing it again; not with
    `quantize="trained"`, which traces rounded weights.

    license: of the model, for its card; what others load or publish has one.

    The folder appears whole and verified or not at all; an older export there is replaced. `CannotExport` where format
    and model do not go together, where `out` holds something else, or where what was written computes something else.
    """
    check_format(to, quantize, sparse)
    named = [to, quantize, "sparse" if sparse else None, "best" if trained.weights == BEST else None]
    out = out or trained.run_dir / "export" / "-".join(filter(None, named))
    if quantize == AS_TRAINED:
        trained = trained.as_trained()
        _check_trained(trained, to)
    adapter = peft_file.adapter_of(trained) if to == "peft" else None
    # which may merge its adapters from here on
    before = None if trained.changed else _loss(eager(trained.as_run.eval()), trained)
    form = _peft_format(trained, adapter) if adapter else _format(trained, to, quantize, sparse, traced)
    with whole(out) as folder:
        notes = form.write(folder)
        if quantize is None and trained.rounding is not None:
            notes.append(f"the weights in full; --quantize {AS_TRAINED} stores the bits that they were trained for")
        batch = sample(trained)
        reloaded = form.reload(folder)
        logits = reloaded(batch)
        wanted, original = form.expected()(batch), eager(trained.model)(batch)
        error = relative_error(logits, wanted, batch)
        if error > form.tolerance:
            raise CannotExport(
                f"{to}: the written file computes different numbers: relative error {error:.2g}, "
                f"allowed {form.tolerance:g}. The export was removed."
            )
        if before is not None and quantize is None and to != "onnx":  # graphs take no positions of packed documents
            _same_loss(to, before, _loss(reloaded, trained), next(trained.model.parameters()).dtype)
        manifest = {
            "version": 1, "to": to, "quantize": quantize, "sparse": sparse, "run": trained.run_id,
            "run_dir": str(trained.run_dir.resolve()), "recipe": trained.recipe.hash, "task": trained.kind,
        }  # fmt: skip
        if to in model_card.LIBRARIES:
            model_card.write_card(folder, trained.run_dir, trained.recipe, trained.task.receipt(), to, license)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    files = file_sizes(out)
    return Exported(
        path=str(out), to=to, quantize=quantize, sparse=sparse, bytes=sum(files.values()), files=files, error=error,
        tolerance=form.tolerance, from_original=relative_error(logits, original, batch), notes=tuple(notes),
    )  # fmt: skip


def _loss(logits_of: LogitsFunction, trained: Trained) -> float | None:
    """On up to four held-out samples; None where there are none, or the task is the user's own."""
    return quality(logits_of, trained, at_most=4).get("loss")


def _same_loss(to: str, before: float, after: float | None, dtype: torch.dtype) -> None:
    """Raise `CannotExport` where a written model's loss is not that of the trained one."""
    rounding = 1e-3 if dtype == torch.float32 and to != "gguf-ready-safetensors" else 2e-2
    if after is None or not abs(after - before) <= rounding * max(1.0, abs(before)):
        raise CannotExport(
            f"{to}: the trained model has a loss of {before:.4g} on held-out samples, and what was written "
            f"{after:.4g}. The export was removed."
        )


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file at or below a folder, by its path in there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def check_format(to: str, quantize: str | None, sparse: bool) -> None:
    """Raise `CannotExport` where the format does not exist or cannot hold what is asked of it."""
    if to not in FORMATS:
        raise CannotExport(f"--to {to}: there are {', '.join(FORMATS)}.")
    legal = QUANTIZED.get(to, ())
    if quantize is not None and quantize not in legal:
        held = f"it takes {' or '.join(legal)}" if legal else f"{', '.join(QUANTIZED)} store some"
        raise CannotExport(f"--quantize {quantize}: {to} does not store that; {held}.")
    if sparse and to != "torch":
        raise CannotExport(f"--sparse: {to} cannot store masks; torch can.")


def _check_trained(trained: Trained, to: str) -> None:
    """Raise `CannotExport` where the format has no place for what the run has trained its weights for."""
    rounding = trained.rounding
    assert rounding is not None
    if to == "hf" and rounding.apart:
        raise CannotExport(
            f"--quantize {AS_TRAINED}: {trained.run_dir} keeps its adapters in full precision beside low-bit "
            "weights, and hf holds one matrix for both. torch holds them apart."
        )
    if to == "onnx" and (
        rounding.activation_bits != 8 or any(isinstance(way, Codebook) for way in trained.ways.values())
    ):
        raise CannotExport(
            f"--quantize {AS_TRAINED}: onnx holds int8 products, for training with activation_bits: 8, and "
            f"{trained.run_dir} has trained only its weights for low-bit storage. torch holds those."
        )


def _format(trained: Trained, to: str, quantize: str | None, sparse: bool, traced: Path | None) -> Format:
    ways = trained.ways
    if quantize == AS_TRAINED and to != "torch":  # which packs them; the others hold their values
        trained = trained.with_model(torch_file.rounded(trained.model, AS_TRAINED, ways))
    if to == "hf":
        return Format(
            lambda f: hf.write(trained, f), lambda f: hf.reload(trained, f), lambda: hf.expected(trained), 0.0
        )  # fmt: skip
    if to == "gguf-ready-safetensors":
        return Format(
            lambda f: hf.write_half(trained, f), lambda f: hf.reload(trained, f),
            lambda: hf.expected_half(trained), 0.0,
        )  # fmt: skip
    if to == "torch":
        return Format(
            lambda f: torch_file.write(trained, f, quantize, sparse), lambda f: torch_file.reload(trained, f),
            lambda: torch_file.expected(trained, quantize), 0.0,
        )  # fmt: skip
    if to == "gguf":
        return Format(
            lambda f: gguf_file.write(trained, f, quantize), gguf_file.reload, lambda: hf.expected(trained),
            gguf_file.TOLERANCES[quantize],
        )  # fmt: skip
    products = _products(quantize, ways)
    return Format(
        lambda f: onnx_file.write(trained, f, products, traced=traced), onnx_file.reload,
        lambda: onnx_file.expected(trained, products), 2e-2 if quantize else 1e-4,
    )  # fmt: skip


def _peft_format(trained: Trained, adapter: peft_file.Adapter) -> Format:
    """The adapters alone, which PEFT loads on the base."""
    return Format(
        lambda f: peft_file.write(trained, adapter, f), lambda f: peft_file.reload(trained, f),
        lambda: hf.expected(trained), 1e-5,
    )  # fmt: skip


def _products(quantize: str | None, ways: torch_file.Ways) -> onnx_file.Products | None:
    """What an ONNX file has in int8."""
    if quantize == AS_TRAINED:
        most = max((way.bits for way in ways.values() if isinstance(way, Grid)), default=0)
        bits = min(each for each in PRODUCT_BITS.values() if each >= most)
        return onnx_file.Products(bits=bits, only=ways, on_grid=True)
    if quantize is None:
        return None
    return onnx_file.Products(bits=PRODUCT_BITS["vnni" if quantize == "int8-vnni" else "any"])


def beside(out: Path, kind: str) -> Path:
    """A name next to `out`, hidden, of this process."""
    return out.with_name(f".{out.name}.{kind}-{os.getpid()}")


def clear_leftovers(out: Path) -> None:
    """Remove what killed processes left beside `out`; what they had put aside and not yet replaced comes back."""
    import psutil

    for leftover in out.parent.glob(f".{out.name}.*-*"):
        process = leftover.name.rpartition("-")[2]
        if not process.isdigit() or (int(process) != os.getpid() and psutil.pid_exists(int(process))):
            continue
        if leftover.name.startswith(f".{out.name}.old-") and not out.exists():
            leftover.rename(out)
        elif not leftover.name.startswith(f".{out.name}.candidates-{os.getpid()}"):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write in, which takes its name once the block has succeeded and vanishes if it fails."""
    if out.exists() and not manifest_of(out) and (not out.is_dir() or any(out.iterdir())):
        raise CannotExport(f"{out} exists and was not written by an export: choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(out)
    folder, old = (beside(out, kind) for kind in ("writing", "old"))
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            out.rename(old)
        try:
            folder.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
