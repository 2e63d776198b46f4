"""Tables of models after training: exported, measured, compressed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .display import console, number, show_fields, size

if TYPE_CHECKING:
    from ..export.compress import Compression
    from ..export.write import Exported


def show_export(made: Exported) -> None:
    """Show what was written, how large it is, and how far its outputs are from the model's."""
    rows = {
        "written": made.path,
        "size": f"{size(made.bytes)} ({made.bytes:,} bytes in {len(made.files)} files)",
        "checked": f"reloaded: relative error {made.error:.2g} (allowed {made.tolerance:g})",
    }
    if made.quantize:
        rows["quantized"] = f"{made.quantize}: relative error {made.from_original:.2g} to the trained model"
    show_fields(rows)
    for note in made.notes:
        console.print(f"[yellow]note[/] {note}")


def show_measurement(row: Mapping[str, Any]) -> None:
    """One model: worth, footprint, then a line for each backend and batch, then the comparison with its baseline."""
    rows = {name: row.get(name) for name in ("model", "loss", "perplexity", "accuracy") if row.get(name) is not None}
    share = row["nonzero"] / max(1, row["parameters"])
    rows["size"] = f"{size(row['bytes'])} on disk, {number(row['parameters'])} parameters, {share:.1%} not zero"
    if row["flops_counted"] is not None:
        rows["a sample"] = f"{number(row['flops_counted'])}FLOP counted, {number(row['flops_realised'])}FLOP realised"
    if "peak_bytes" in row:
        rows["memory"] = (
            f"{size(row['peak_bytes'])} at most, {size(row['over_idle_bytes'])} more than the libraries alone"
        )
    if "recall" in row:
        rows["recall"] = ", ".join(f"{name} {share:.1%}" for name, share in row["recall"].items())
    show_fields(rows)
    table = Table(box=None, pad_edge=False, title_justify="left", title=f"{row['machine']}, {row['threads']} threads")
    for column in ("backend, batch", "median ms", "p95 ms", "CPU ms", "samples/s", "J/sample"):
        table.add_column(column)
    for name, timing in row["timings"].items():
        figures = [
            f"{timing[key]:.3g}" for key in ("p50_ms", "p95_ms", "cpu_ms", "samples_per_second", "joules_per_sample")
        ]
        table.add_row(name, *figures[:-1], f"{figures[-1]} ({timing['joules_source']})")
    console.print(table)
    if row.get("against"):
        show_fields(row["against"])
    show_fields({"ledger": "one row" if row["recorded"] else "no row: it belongs to no run (give --data RUN)"})
    if row.get("note"):
        console.print(f"[yellow]note[/] {row['note']}")


def show_front(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> None:
    """The models on a Pareto front, the cheapest first."""
    table = Table(box=None, pad_edge=False)
    for column in (x, y, "backend", "run", "model"):
        table.add_column(column, overflow="fold")
    for row in rows:
        cost = f"{row[x]:,}" if isinstance(row[x], int) else f"{row[x]:.4g}"
        table.add_row(cost, f"{row[y]:.4g}", str(row["backend"]), row["run"], row["model"])
    console.print(table if rows else "no measured models yet: shoestring measure MODEL")


def show_compression(result: Compression) -> None:
    """The model before, every candidate tried, the smallest first, and the one that was kept."""
    table = Table(box=None, pad_edge=False)
    for column in ("candidate", "backend", "bytes", "ms", "accuracy", "loss", ""):
        table.add_column(column, overflow="fold")
    for tried in (*result.before, *sorted(result.tried, key=lambda t: t.bytes or float("inf"))):
        figures = [
            f"{value:.4g}" if value is not None else "-" for value in (tried.latency_ms, tried.accuracy, tried.loss)
        ]
        verdict = tried.problem or "too large" * tried.skipped or "fits" * tried.fits
        verdict = "chosen" if tried.name == result.chosen else verdict
        table.add_row(tried.name, tried.backend, "-" if tried.bytes is None else f"{tried.bytes:,}", *figures, verdict)
    console.print(table)
    if result.path:
        show_fields({"written": result.path})
