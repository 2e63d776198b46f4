"""The model card (README.md) of an export: what it is, what it has cost and learnt from, and the recipe to redo it.

Source of the form: Mitchell et al., Model Cards for Model Reporting, arXiv 1810.03993, with the hub's metadata.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...recipes import Recipe, dump_recipe
from ..ledger import RunIdentity
from ..ledger.identity import read_summary

if TYPE_CHECKING:
    from ..tasks.build import Receipt

NAME = "README.md"
LIBRARIES = {"hf": "transformers", "peft": "peft", "gguf": "gguf", "gguf-ready-safetensors": "transformers"}
PIPELINES = {
    "causal-lm": "text-generation", "seq2seq": "text2text-generation", "sequence-classification": "text-classification",
}  # fmt: skip
UNKNOWN = "unknown"  # the hub's own word


def write_card(
    folder: Path, run_dir: Path, recipe: Recipe, receipt: Receipt | None, to: str, license: str | None = None
) -> None:
    """`README.md` in the folder of an export.

    Args:
        folder: The export.
        run_dir: The run, whose totals are read from its records.
        recipe: Of the run.
        receipt: Of its data; None where that is not known.
        to: The format of the export.
        license: The model's, as the hub names it; by default the base's, where its own card is here.
    """
    base = recipe.model.name
    license = license or _license_of(base)
    parts = [
        f"---\n{_metadata(recipe, to, license)}\n---",
        f"# {recipe.name}",
        " ".join(_what(recipe, base)),
        "## Use\n\n" + _use(to, recipe.model.task, base),
        "## What it has cost\n\n" + _table(_costs(read_summary(run_dir))),
        "## What it has reached\n\n" + _table(_metrics(read_summary(run_dir))),
        "## What it has learnt from\n\n" + _table(_data(recipe, receipt)),
        "## Licence\n\n" + _licence(license, base),
        f"## Recipe\n\n{_origin(run_dir)}\n\n```yaml\n{dump_recipe(recipe).rstrip()}\n```",
    ]
    (folder / NAME).write_text("\n\n".join(parts) + "\n")


def is_hub_id(name: str | None) -> bool:
    """Whether a model's name is one of the hub, and not a folder here."""
    return bool(name) and not Path(str(name)).expanduser().exists() and str(name).count("/") == 1


def _metadata(recipe: Recipe, to: str, license: str) -> str:
    from huggingface_hub import ModelCardData

    adapter = recipe.model.adapter
    tags = ["shoestring", *([adapter.kind] if adapter else []), *(["gguf"] if to == "gguf" else [])]
    data = ModelCardData(
        license=license, library_name=LIBRARIES[to], pipeline_tag=PIPELINES.get(recipe.model.task), tags=tags,
        base_model=recipe.model.name if is_hub_id(recipe.model.name) else None,
    )  # fmt: skip
    return data.to_yaml()


def _what(recipe: Recipe, base: str | None) -> Iterator[str]:
    model = recipe.model
    yield f"A model for {PIPELINES.get(model.task, model.task).replace('-', ' ')}, trained with Shoestring."
    if base is not None:
        yield f"It began as `{base}`" + ("." if model.adapter is None else f", with {model.adapter.kind} adapters")
        if model.adapter is not None:
            kept = f" beside the base in {model.dtype}" if model.dtype in ("nf4", "int8") else ""
            yield f"of rank {model.adapter.rank} trained{kept}."
    else:
        yield "It was trained from scratch."


def _use(to: str, task: str, base: str | None) -> str:
    if to == "gguf":
        return "```sh\nllama-cli -m model.gguf\n```"
    forms = {
        "causal-lm": "ForCausalLM", "seq2seq": "ForSeq2SeqLM", "sequence-classification": "ForSequenceClassification",
    }  # fmt: skip
    kind = f"AutoModel{forms.get(task, '')}"
    load = f'model = {kind}.from_pretrained("PATH")'
    imports = f"from transformers import AutoTokenizer, {kind}"
    if to == "peft":
        imports = f"from peft import PeftModel\n{imports}"
        load = f'model = PeftModel.from_pretrained({kind}.from_pretrained("{base or "ITS BASE"}"), "PATH")'
    lines = [imports, "", load, 'tokenizer = AutoTokenizer.from_pretrained("PATH")']
    shell = "" if task not in ("causal-lm", "seq2seq") else '\n\n```sh\nshoestring generate PATH "Hello"\n```'
    return "```python\n" + "\n".join(lines) + "\n```" + shell


def _costs(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not summary:
        return
    yield "money", f"${summary.get('usd', 0):.4g}"
    yield (
        "time",
        f"{summary.get('seconds', 0) / 3600:.4g} hours, {summary.get('device_seconds', 0) / 3600:.4g} device-hours",
    )
    if summary.get("kwh") is not None:
        yield "energy", f"{summary['kwh']:.3g} kWh, {summary.get('kwh_source', 'estimated')}"
    yield "steps", f"{summary.get('steps', 0):,}"
    if summary.get("tokens"):
        yield "tokens", f"{summary['tokens']:,.0f}"
    yield "ended by", str(summary.get("stopped_by"))


def _metrics(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in sorted(summary.get("metrics", {}).items()):
        if isinstance(value, int | float):
            yield name, f"{value:.6g}"


def _data(recipe: Recipe, receipt: Receipt | None) -> Iterator[tuple[str, str]]:
    yield "source", f"`{recipe.data.source}`"
    if receipt is None:
        return
    yield "samples", f"{receipt.samples:,} to train on, {receipt.validation_samples:,} held out"
    if receipt.tokens:
        yield "tokens an epoch", f"{receipt.tokens:,}"
    if receipt.trained_tokens:
        yield "trained on", f"{receipt.trained_tokens:,} of them ({receipt.trained_share:.1%})"
    for name, count in receipt.left_out.items():
        yield name.replace("_", " "), f"{count:,}"


def _table(rows: Iterator[tuple[str, str]]) -> str:
    body = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *body]) if body else "Not recorded."


def _license_of(base: str | None) -> str:
    """What the card of a base that lies here says."""
    from huggingface_hub import ModelCard

    card = Path(base).expanduser() / NAME if base else None
    if card is None or not card.is_file():
        return UNKNOWN
    try:
        return str(ModelCard.load(card).data.license or UNKNOWN)
    except (ValueError, OSError):  # a README without metadata, or with other
        return UNKNOWN


def _licence(license: str, base: str | None) -> str:
    known = f"`{license}`." if license != UNKNOWN else "Not stated: whoever publishes this has to choose one."
    of_base = f" The licence of its base, `{base}`, holds for what is made of it, too." if base else ""
    return f"{known}{of_base} The licences of the data are not recorded by its source: state them here."


def _origin(run_dir: Path) -> str:
    run = RunIdentity.load(run_dir)
    packages = ", ".join(f"{name} {version}" for name, version in run.versions.items() if name != "platform")
    commit = f", commit `{run.git_commit}`" if run.git_commit else ""
    return f"Run `{run.id}`, recipe `{run.recipe_hash}`{commit}; {packages}."
