"""What the terminal shows: the plan before, a line that moves during, a table after."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..ledger.verdict import used
from .class_display import show_classes
from .receipt_display import show_receipt

if TYPE_CHECKING:
    from ..ledger import RunRow
    from ..ledger.report import Report
    from ..machine.doctor import Finding
    from ..planning.planner import Plan

MOMENTS = {"loss": "at the loss", "backward": "in the backward pass", "step": "in the optimizer's step"}

console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)


def number(value: float | None, unit: str = "") -> str:
    """1234567 -> "1.23 M"; None -> "-"."""
    if value is None:
        return "-"
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()


def size(value: float | None) -> str:
    """Bytes in binary units."""
    if value is None:
        return "-"
    for amount, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= amount:
            return f"{value / amount:.3g} {unit}"
    return f"{value:.0f} B"


def dollars(value: float | None) -> str:
    return "-" if value is None else f"${value:.4f}" if value < 1 else f"${value:,.2f}"


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.2f} h"


# -- before --------------------------------------------------------------------------------------------------------
def show_plan(plan: Plan) -> None:
    """Choices with reasons, techniques in order, predictions."""
    table = Table(title=f"plan: {plan.recipe.name} ({plan.recipe.hash})", title_justify="left", expand=False)
    for column in ("what", "choice", "why"):
        table.add_column(column, overflow="fold")
    for choice in plan.choices:
        table.add_row(choice.what, choice.value, choice.why)
    for place, technique in enumerate(plan.declared, 1):
        table.add_row(f"technique {place}", technique.card.name, repr(technique).partition("(")[2][:-1])
    console.print(table)
    facts = plan.predictions
    if facts.get("parameters"):
        lines = [
            ("parameters", f"{number(facts['parameters'])} ({number(facts['trainable'])} trained)"),
            (
                "a step",
                f"{number(facts.get('flops_per_step'), 'FLOP')}, {seconds(facts.get('seconds_per_step'))}",
            ),
        ]
        if "binding" in facts:
            cost = f"{seconds(facts.get('seconds'))}, {dollars(facts.get('usd'))}, {facts.get('kwh', 0):.2g} kWh"
            cost += f" ({seconds(facts.get('seconds_besides_steps'))} of it for the start and the end)"
            lines.append(
                (
                    "the run",
                    f"about {facts['steps']:,} steps until the budget of {facts['binding']} ends: {cost}",
                )
            )
        console.print("predicted (estimates):")
        for name, text in lines:
            console.print(f"  {name:16} {text}")
        _show_memory(facts)
    for warning in plan.warnings:
        console.print(f"[yellow]note[/] {warning}")


def _show_memory(facts: Mapping[str, Any]) -> None:
    """What a device's and a node's memory holds, term by term; a star: at the fullest moment of a step."""
    if "memory_terms" not in facts:
        return
    there, alive = facts.get("memory_available_bytes"), {*facts["memory_at_moment"], "context", "fragmentation"}
    title = f"memory a device: {size(facts['memory_bytes'])}" + (f" of {size(there)}" if there else "")
    console.print(f"{title}; * at the fullest moment, {MOMENTS[facts['memory_moment']]}")
    for name, held in sorted(facts["memory_terms"].items(), key=lambda term: -term[1]):
        console.print(f"  {size(held):>10} {'*' if name in alive else ' '} {name}")
    if facts["host_terms"]:
        there = facts.get("host_available_bytes")
        console.print(f"host memory a node: {size(facts['host_bytes'])}" + (f" of {size(there)}" if there else ""))
        for name, held in sorted(facts["host_terms"].items(), key=lambda term: -term[1]):
            console.print(f"  {size(held):>10}   {name}")


# -- during --------------------------------------------------------------------------------------------------------
class Bar:
    """Loss, throughput, spend and what is left; a moving bar on a terminal, a line every few seconds elsewhere."""

    EVERY = 10.0  # seconds between lines where nothing can move

    def __init__(self, limits: Mapping[str, float]) -> None:
        self._limits = dict(limits)
        self._last: dict[str, Any] = {}
        self._printed = 0.0
        self._first: tuple[float, float] | None = None  # progress and seconds of the first row
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.fields[share]:>7}"), BarColumn(), TextColumn("{task.description}"),
                TimeElapsedColumn(), console=console, refresh_per_second=4,
            )  # fmt: skip
            self._task = self._bar.add_task("preparing", total=None, share="")  # moves to and fro
            self._bar.start()

    def receipt(self, receipt: Mapping[str, Any]) -> None:
        """Show what is about to be learnt."""
        show_receipt(receipt, console)

    def samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """The begin of what the model has written, a line each."""
        for sample in samples:
            line = f"step {step:,}  {sample['prompt']} -> {sample['text']}"
            console.print(" ".join(line.split()), markup=False, overflow="ellipsis", no_wrap=True)

    def step(self, row: Mapping[str, Any]) -> None:
        self._last.update(row)
        if self._bar is not None:
            done = self._last.get("progress", 0.0)
            self._bar.update(self._task, total=1.0, completed=done, share=f"{done:.1%}", description=self._text())
        elif time.monotonic() - self._printed > self.EVERY:
            self._printed = time.monotonic()
            console.print(f"{self._last.get('progress', 0.0):6.1%}  {self._text()}")

    def _text(self) -> str:
        row = self._last
        rate = row.get("tokens_per_second") or row.get("samples_per_second")
        unit = "tokens/s" if row.get("tokens_per_second") else "samples/s"
        parts = [f"step {row.get('step', 0):,}/{row.get('horizon') or '?'}"]
        if row.get("loss") is not None:
            parts.append(f"loss {row['loss']:.3f}")
        parts += [f"{key} {row[key]:.3f}" for key in ("val_loss", "val_accuracy") if key in row]
        parts += [f"{number(rate)} {unit}", f"spent {dollars(row.get('usd'))}"]
        return "  ".join([*parts, *self._left(), *self._to_go()])

    def _to_go(self) -> list[str]:
        """The time to the last step, as the steps since the first row have gone; a budget of time says it itself."""
        now = (self._last.get("progress", 0.0), self._last.get("seconds", 0.0))
        if self._first is None:
            self._first = now
        done, taken = now[0] - self._first[0], now[1] - self._first[1]
        return (
            [f"about {seconds(taken / done * (1.0 - now[0]))} to go"]
            if min(done, taken) > 0 and "hours" not in self._limits
            else []
        )

    def _left(self) -> list[str]:
        ways = {
            "usd": ("usd", 1.0, dollars), "hours": ("seconds", 3600.0, seconds),
            "tokens": ("tokens", 1.0, number), "samples": ("samples", 1.0, number),
        }  # fmt: skip
        return [
            f"left {show(max(0.0, limit * ways[name][1] - self._last.get(ways[name][0], 0.0)))}"
            for name, limit in self._limits.items()
            for show in [ways.get(name, (None, None, None))[2]]
            if show is not None
        ]

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


# -- after ---------------------------------------------------------------------------------------------------------
def show_report(report: Report) -> None:
    """The closing table: quality beside its baselines, throughput, memory, cost, and the budget used."""
    total = report.summary
    metrics, table = total["metrics"], Table(title="run finished", title_justify="left", show_header=False)
    rows = [(name, "not finite" if value is None else f"{value:.4f}") for name, value in metrics.items()]
    rows += [(f"  baseline: {name}", f"{value:.4f}") for name, value in report.baselines.items()]
    if report.goal_reached is not None:
        goal = total["goal"]
        target = f"{goal['metric']} {'above' if goal['above'] is not None else 'below'}"
        limit = goal["above"] if goal["above"] is not None else goal["below"]
        rows.append(("goal", f"{target} {limit:g}: {'reached' if report.goal_reached else 'NOT reached'}"))
    rate, unit = (total["tokens_per_second"], "tokens/s")
    if not total["tokens"]:
        rate, unit = total["samples_per_second"], "samples/s"
    rows += [
        ("steps", f"{total['steps']:,}, stopped by {total['stopped_by']}"),
        ("tokens / samples", f"{total['tokens']:,.0f} / {total['samples']:,.0f}{_trained(total)}{_padding(total)}"),
        ("throughput", f"{number(rate)} {unit}" + (f", MFU {total['mfu']:.1%}" if total["mfu"] else "")),
        ("data wait", f"{total['data_wait']:.1%} of training"),
        ("FLOPs", f"{number(total['flops_counted'])} counted, {number(total['flops_realised'])} realised"),
        ("peak memory", f"{size(total['peak_bytes'])} a device"),
        ("time", f"{seconds(total['seconds'])} ({_windows(total['windows'])})"),
        ("energy", f"{total['kwh']:.6f} kWh, {total['kwh_source']}"),
        ("cost", dollars(total["usd"]) + _of_a_million(total)),
        ("budget used", _used(total)),
        ("run", str(report.run_dir)),
    ]
    if report.exported:
        rows.append(("model", str(report.exported)))
    for name, text in rows:
        table.add_row(name, text)
    show_classes(report.details, console)
    console.print(table)
    if report.sample is not None:
        console.print("sample:")
        console.print(report.sample, markup=False)


def _trained(total: Mapping[str, Any]) -> str:
    return f", {total['trained_tokens']:,.0f} tokens trained on" if total.get("trained_tokens") else ""


def _of_a_million(total: Mapping[str, Any]) -> str:
    price = total.get("usd_per_million_trained_tokens")
    return "" if price is None else f", {dollars(price)} per million trained tokens"


def _padding(total: Mapping[str, Any]) -> str:
    return f", and {total['padding_share']:.1%} of all positions are padding" if total.get("padding") else ""


def _windows(windows: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {seconds(value)}" for name, value in windows.items() if value >= 0.05)


def _used(total: Mapping[str, Any]) -> str:
    return ", ".join(f"{share:.1%} of {total['budget'][name]:g} {name}" for name, share in used(total).items())


def show_runs(runs: Sequence[RunRow]) -> None:
    """One line a run, newest first."""
    table = Table(box=None, pad_edge=False)
    figures = ["steps", "val loss", "train loss", "tokens", "tokens/s", "memory", "kWh", "cost", "time"]
    for column in ("id", "name", "status", *figures, "stopped by"):
        table.add_column(column, overflow="fold", no_wrap=column != "name")
    for run in runs:
        losses = [run.metrics.get(name) for name in ("val_loss", "loss")]
        shown = ["-" if loss is None else f"{loss:.3f}" for loss in losses]
        table.add_row(
            run.id, run.name, run.status, f"{run.steps or 0:,}", *shown,
            number(run.tokens), number(run.tokens_per_second), size(run.peak_bytes),
            "-" if run.kwh is None else f"{run.kwh:.5f}", dollars(run.usd), seconds(run.seconds), run.stopped_by or "",
        )  # fmt: skip
    console.print(table if runs else "no runs yet")


def show_fields(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        console.print(f"{name:20} {value}", markup=False)


def show_findings(findings: Iterable[Finding]) -> None:
    """Show what this machine has, what is missing, and the command that fixes it."""
    marks = {True: "[green]ok[/]", False: "[red]missing[/]", None: "[yellow]optional[/]"}
    for finding in findings:
        console.print(f"{marks[finding.ok]:>20}  {finding.name}: {finding.found}")
        if finding.ok is not True and finding.fix:
            console.print(f"            {finding.fix}", markup=False)
