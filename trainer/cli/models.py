"""The commands about trained models: export, measure, compress, and the front of all that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import AllowCode, AsJson, complete_run, print_json, stdout_to_stderr

if TYPE_CHECKING:
    from ..export.compress import Tried
    from ..export.trained import Trained

RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's directory, id or name.", autocompletion=complete_run)
]


def export(
    run: RunName,
    to: Annotated[str, typer.Option("--to", help="hf, torch, onnx, gguf, gguf-ready-safetensors or peft.")],
    out: Annotated[Path | None, typer.Option("--out", help="A folder; default RUN/export/<format>.")] = None,
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="int8, int8-vnni, int4, float16, bfloat16, q8_0, trained.")
    ] = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="Store masks and kept values (torch).")] = False,
    best: Annotated[bool, typer.Option("--best", help="The weights of the best evaluation (checkpoint.best).")] = False,
    license: Annotated[str | None, typer.Option("--license", help="For the model card, like apache-2.0.")] = None,
    repo: Annotated[
        str | None, typer.Option("--push", metavar="REPO", help="Upload it to this repository of the hub, owner/name.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="The repository that --push makes is for everybody.")
    ] = False,
    as_json: AsJson = False,
    allow_code: AllowCode = False,
) -> None:
    """Write a finished run's model in another form; kept only if, read back, it computes the same."""
    from ..export.push import push
    from ..export.trained import open_run
    from ..export.write import check_format
    from ..export.write import export as write
    from ..machine.quiet import quiet

    quiet()
    check_format(to, quantize, sparse)
    with stdout_to_stderr(as_json):
        trained = open_run(run, allow_code=allow_code, best=best)
        made = write(trained, to, out=out, quantize=quantize, sparse=sparse, license=license)
    address = None if repo is None else push(Path(made.path), repo, public=public)
    if as_json:
        print_json({**made.as_dict(), "pushed_to": address})
        return
    from .model_display import show_export

    show_export(made)
    if address is not None:
        typer.echo(f"pushed to    {address}")


def measure(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, an export, a Hugging Face folder, an .onnx.")],
    batch: Annotated[list[str] | None, typer.Option("--batch", help="Rows x tokens, like 1x128; repeatable.")] = None,
    backend: Annotated[list[str] | None, typer.Option("--backend", help="eager, compile, onnxruntime.")] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Another model to compare with.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="The run on whose validation data it is evaluated.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, in a separate process.")] = True,
    as_json: AsJson = False,
    allow_code: AllowCode = False,
) -> None:
    """Quality, size, FLOPs, latency, memory and energy of a model on this machine; one row in the ledger."""
    from ..export.measure_target import home_of
    from ..export.measurement import MeasureOptions, parse_shape, record
    from ..export.measurement import measure as measured
    from ..machine.quiet import quiet

    quiet()
    shapes = tuple(parse_shape(text) for text in batch or ())
    options = MeasureOptions(
        backends=tuple(backend or ()), shapes=shapes, memory=memory, data=data, allow_code=allow_code
    )
    with stdout_to_stderr(as_json):
        result = measured(model, options, baseline=baseline)
    result["recorded"] = record(result, home_of(model, data))
    if as_json:
        print_json(result)
    else:
        from .model_display import show_measurement

        show_measurement(result)


def pareto(
    x: Annotated[
        str, typer.Option("--x", help="The cost to compare: bytes, latency_ms, nonzero, joules_per_sample ...")
    ] = "bytes",
    y: Annotated[str, typer.Option("--y", help="The quality to compare: accuracy, loss ...")] = "accuracy",
    as_json: AsJson = False,
) -> None:
    """The measured models that no other beats in both; of a model measured twice, the newest figures count."""
    from ..export.pareto import front
    from ..ledger import Ledger

    rows = front(Ledger().models(), x, y)
    if as_json:
        print_json(rows)
    else:
        from .model_display import show_front

        show_front(rows, x, y)


def compress(
    run: RunName,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Of --with.")] = None,
    budget_bytes: Annotated[str | None, typer.Option("--budget-bytes", help="The weights' size, like 25MB.")] = None,
    max_latency: Annotated[str | None, typer.Option("--max-latency", help="Median of one call, like 5ms.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--with", metavar="RECIPE", help="Continue training the model first, with this recipe."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", help="The input of one call: rows x tokens, like 1x128.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="A folder; default RUN/export/compressed.")] = None,
    as_json: AsJson = False,
    allow_code: AllowCode = False,
) -> None:
    """Try every way to make a finished run's model smaller, measure each, keep the best one that fits.

    --with RECIPE trains it on before, in RUN/compress/RECIPE, by the techniques, the optimizer and the budget of
    RECIPE: the model starts from what RUN has learnt, and has it as its teacher. The same command resumes.
    """
    from ..export.compress import Limits, search
    from ..export.measurement import parse_shape
    from ..export.trained import CannotExport, open_run
    from ..machine.quiet import quiet

    quiet()
    limits = Limits.parse(budget_bytes, max_latency)
    shape = parse_shape(batch) if batch else None
    if overrides and recipe is None:
        raise CannotExport(f"{overrides[0]} changes a recipe, but no recipe was given: name one by --with.")
    with stdout_to_stderr(as_json):
        before = trained = open_run(run, allow_code=allow_code)
        if recipe is not None:
            home = _retrained(trained, recipe, overrides or (), shown=not as_json, allow_code=allow_code)
            if home is None:  # one of several ranks, whose part is done
                return
            trained = open_run(home, allow_code=allow_code)
        result = search(trained, limits, before=before, out=out, shape=shape, report=_report)
    if as_json:
        print_json(result.as_dict())
    else:
        from .model_display import show_compression

        show_compression(result)
    result.require_fit()


def _retrained(
    trained: Trained, recipe: str, overrides: Sequence[str], *, shown: bool, allow_code: bool
) -> Path | None:
    from ...recipes import load_recipe
    from ..machine.facts import is_first
    from ..run.retrain import retrained
    from .display import Bar

    over = load_recipe(recipe, overrides, allow_code)
    say = partial(typer.echo, err=True) if is_first() else lambda text: None
    bar = Bar({}) if shown and is_first() else None
    try:
        return retrained(trained, over, say=say, display=bar, allow_code=allow_code)
    finally:
        if bar is not None:
            bar.close()


def _report(tried: Tried) -> None:
    """One line of progress on the error output."""
    size = "" if tried.bytes is None else f"{tried.bytes:,} bytes"
    if tried.accuracy is not None:
        size += f", accuracy {tried.accuracy:.4f}"
    more = tried.problem or ("too large, not written" if tried.skipped else "")
    typer.echo(f"tried {tried.name}: {', '.join(filter(None, [size, more]))}", err=True)
