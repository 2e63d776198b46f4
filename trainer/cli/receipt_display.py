"""The receipt of a run's data, as `data` and `train` show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

TRAINED = "bold green"
LEFT_OUT = {
    "rows_without_text": "without text, left out", "rows_cut": "cut at sequence_length",
    "rows_without_target": "whose answers begin after sequence_length, left out",
}  # fmt: skip


def show_receipt(receipt: Mapping[str, Any], console: Console) -> None:
    """Samples with what is trained on marked, by colour or, where there is none, by brackets; then the counts."""
    for place, stretches in enumerate(receipt["shown"], 1):
        console.print(f"[dim]sample {place} of those shown:[/]")
        console.print(marked(stretches, colour=console.is_terminal and console.color_system is not None))
    lines = [f"{receipt['samples']:,} samples to train on, {receipt['validation_samples']:,} held out"]
    if receipt["tokens"]:
        lines[0] += f"; {receipt['documents']:,} documents"
        tokens = f"{receipt['tokens']:,} tokens an epoch"
        if receipt["trained_tokens"]:
            tokens += f", {receipt['trained_share']:.1%} of them trained on"
        if receipt["padding"] > 0.001:
            tokens += f"; {receipt['padding']:.1%} of all positions are padding"
        lines.append(tokens)
        names = {"50": "half of them at most", "100": "the longest"}
        lengths = [f"{names.get(str(p), f'{p} % at most')} {length:,}" for p, length in receipt["lengths"].items()]
        lines.append(f"tokens of a document: {', '.join(lengths)}")
    lines += [f"{count:,} rows {LEFT_OUT[name]}" for name, count in receipt["left_out"].items()]
    if bad := receipt["bad_rows"]:
        reasons = ", ".join(f"{count:,} {escape(reason)}" for reason, count in bad.items())
        lines.append(f"[yellow]{sum(bad.values()):,} rows cannot be read, left out: {reasons}[/]")
    lines += [
        f"{one['weight']:.1%} from {escape(one['source'])}: {one['samples']:,} samples, read {one['epochs']:.3g} times"
        for one in receipt["sources"]
    ]
    if receipt["duplicates"]:
        lines.append(f"[yellow]{receipt['duplicates']:,} documents are held out and trained on, too[/]")
    if receipt["classes"]:
        sizes = sorted(receipt["classes"].items(), key=lambda item: -item[1])
        shown = ", ".join(f"{escape(name)} {count:,}" for name, count in sizes[:8])
        lines.append(f"{len(sizes)} classes: {shown}{', …' if len(sizes) > 8 else ''}")
    for line in lines:
        console.print(f"data: {line}")


def marked(stretches: list[tuple[str, bool]], *, colour: bool) -> Text:
    """A sample as one text; control characters are spelled out."""
    text = Text()
    for part, trained in stretches:
        shown = "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in part)
        if trained and not colour:
            shown = f"⟦{shown}⟧"
        text.append(shown, style=TRAINED if trained else "dim" if colour else "")
    return text
