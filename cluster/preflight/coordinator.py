"""Node 0's part of the pre-flight: it queries the nodes, judges, and announces the verdict."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from ...files import replace_file
from ..config.document import ClusterError
from ..node import ranks
from . import allreduce, verdict
from .verdict import NodeReport, Pair, PreflightTask, Verdict

RETRIES = 3  # of suspects, with other nodes
ROUND = 30.0  # seconds an all-reduce of a few megabytes may take before it counts as hung


class Coordinator:
    """Coordinates the pre-flight of one attempt and fills in `result`, the verdict."""

    def __init__(self, task: PreflightTask, store: Any, result: Verdict, answer: Callable[..., Any]) -> None:
        self.task, self.store, self.result, self.answer = task, store, result, answer
        self.limits, self.began = task.limits, time.monotonic()
        self.reports: dict[int, NodeReport] = {}
        self.faults: dict[int, list[str]] = {}
        self.pairs: dict[Pair, float] = {}
        self._sequence: dict[int, int] = {}
        self._rounds = 0

    def run(self, report: Callable[[], NodeReport]) -> Verdict:
        """Go from this node's own report to the verdict, which all nodes get even if something goes wrong here."""
        try:
            self.reports[0] = report()
            self._collect_reports()
            self._clocks()
            self._judge()
            if not self._bad() and self.task.nodes > 1:
                self._ring()
            if not self._bad() and self.task.nodes > 1:
                self._everybody()
            self._conclude()
        except ClusterError as error:
            self.result.error = str(error)
            raise
        except Exception as error:
            traceback.print_exc()
            self.result.error = f"the pre-flight could not be done: {type(error).__name__}: {error}"
            raise ClusterError(self.result.error) from error
        finally:
            self._announce()
        return self.result

    # -- queries ---------------------------------------------------------------------------------------------------
    def _collect_reports(self) -> None:
        """Wait for the reports of all nodes, until the timeout."""
        for node in range(1, self.task.nodes):
            left = self.began + self.task.timeout - time.monotonic()
            report = self._get(f"report/{node}", max(left, 0.05))
            if report is not None:
                self.reports[node] = NodeReport(**{**report, **{k: tuple(report[k]) for k in ("problems", "matmul")}})
        if len(self.reports) < self.task.nodes:
            alive = {record.node_rank for record in ranks.read(*_place(self.task.folder))}
            for node in verdict.absent(self.task.nodes, self.reports, alive):
                why = f"has not reported within {self.task.timeout:g} s"
                self._blame(node, "no other node can reach it" if node == 0 else why)

    def _get(self, key: str, seconds: float) -> Any:
        """What the store holds under `key`, waited for; None if it does not come in time."""
        import torch.distributed as dist

        try:
            self.store.wait([key], timedelta(seconds=seconds))
        except dist.DistStoreError:
            return None
        return json.loads(self.store.get(key))

    def _query(self, messages: Mapping[int, Mapping[str, Any]], seconds: float) -> dict[int, Any]:
        """Ask several nodes at the same time; their answers, None from who is silent."""
        replies: dict[int, Any] = {}
        for node, message in messages.items():
            if node:
                self.store.set(f"request/{node}/{self._sequence.setdefault(node, 0)}", json.dumps(message))
        if 0 in messages:
            replies[0] = self.answer(self.task, self.store, messages[0])
        end = time.monotonic() + seconds
        for node in messages:
            if node:
                replies[node] = self._get(f"reply/{node}/{self._sequence[node]}", max(end - time.monotonic(), 0.05))
                self._sequence[node] += 1
                if replies[node] is None:
                    self._blame(node, f"has not answered within {seconds:g} s")
        return replies

    def _clocks(self) -> None:
        for node in [node for node in self.reports if node]:
            before = time.time()
            clock = self._query({node: {"what": "clock"}}, ROUND).get(node)
            after = time.time()
            if clock is not None:
                skew, error = clock - (before + after) / 2, (after - before) / 2
                self.reports[node] = replace(self.reports[node], skew=skew, skew_error=error)

    # -- judging ---------------------------------------------------------------------------------------------------
    def _judge(self) -> None:
        """Each node by itself, then its devices beside all others'."""
        if len(self.reports) == self.task.nodes and (short := verdict.shortage(self.reports.values(), self.limits)):
            raise ClusterError(short)
        for node, report in self.reports.items():
            for fault in verdict.faults(report, self.limits):
                self._blame(node, fault)
        slow = self._slow_devices()
        if slow and not self.task.on_gpus:  # what else runs on a CPU comes and goes: once more, and now alone
            for node, speed in self._query({node: {"what": "matmul"} for node in slow}, ROUND).items():
                report = self.reports[node]
                if isinstance(speed, float):
                    self.reports[node] = replace(report, matmul=(max(speed, *report.matmul),))
            slow = self._slow_devices()
        for node, fault in slow.items():
            self._blame(node, fault)

    def _slow_devices(self) -> dict[int, str]:
        return verdict.slow_devices({n: r.matmul for n, r in self.reports.items()}, self.limits.matmul)

    def _ring(self) -> None:
        """Pairs of neighbours; then who is slow with both, with others."""
        for pairs in verdict.ring(range(self.task.nodes)):
            self._reduce(pairs)
            if self._bad():  # a node has fallen silent: its neighbours cannot be judged by it
                return
        suspects = verdict.slow_nodes(self.pairs, self.limits.allreduce)
        for turn in range(RETRIES if suspects else 0):  # what else uses a machine or a link comes and goes
            self._reduce(verdict.rematch(suspects, set(self.reports) - suspects, turn), times=4 * allreduce.TIMES)
            suspects = verdict.slow_nodes(self.pairs, self.limits.allreduce)
            if self._bad():
                return
            if not suspects:
                break
        best = verdict.better(self.pairs)
        for node in suspects:
            self._blame(node, f"all-reduce: {best[node] / 1e6:.3g} MB/s with every other node it was tried with, "
                              f"wanted {self.limits.allreduce:.0%} of the median (preflight.allreduce)")  # fmt: skip
        for a, b in verdict.slow_links(self.pairs, self.limits.allreduce, suspects):
            self._warn(f"the link {self._name(a)} - {self._name(b)} is slow: {self.pairs[a, b] / 1e6:.3g} MB/s")
        if self.task.nodes == 2:
            self._lone_pair(next(iter(self.pairs.values())))

    def _lone_pair(self, value: float) -> None:
        """Nothing to compare with: only what no training could use condemns, and then both, since neither is known."""
        _, floor, remarkable = allreduce.ON_GPUS if self.task.on_gpus else allreduce.ON_CPUS
        if value < floor and self.limits.allreduce:
            for node in (0, 1):
                self._blame(node, f"all-reduce: {value / 1e6:.3g} MB/s between the two nodes, wanted {floor / 1e6:g}")
        elif value < remarkable:
            self._warn(f"all-reduce between the two nodes: only {value / 1e6:.3g} MB/s")

    def _everybody(self) -> None:
        nodes = range(self.task.nodes)
        values = [self.pairs[0, 1]] if self.task.nodes == 2 else self._reduce([tuple(nodes)])
        if min(values) <= 0 and not self._bad():
            raise ClusterError("an all-reduce works between every pair of nodes, but not between all of them")
        self.result.bandwidth = min(values)

    def _reduce(self, groups: Sequence[Sequence[int]], times: int = allreduce.TIMES) -> list[float]:
        """Let groups of nodes reduce at the same time; the bandwidth of each, as its slowest member saw it."""
        seconds = min(ROUND, self.task.timeout)
        self._rounds += 1
        messages = {
            node: {"what": "allreduce", "where": f"{self._rounds}/{group[0]}", "place": place, "size": len(group),
                   "times": times, "timeout": seconds}
            for group in groups for place, node in enumerate(group)
        }  # fmt: skip
        replies = self._query(messages, 2 * seconds + 2)  # to try, and to let go of the group
        values = [min(replies[node] or 0.0 for node in group) for group in groups]
        for group, value in zip(groups, values, strict=True):
            if len(group) == 2:
                self.pairs[group[0], group[1]] = max(value, self.pairs.get((group[0], group[1]), 0.0))
        return values

    # -- results ---------------------------------------------------------------------------------------------------
    def _blame(self, node: int, fault: str) -> None:
        self.faults.setdefault(node, []).append(fault)

    def _bad(self) -> bool:
        return bool(self.faults)

    def _warn(self, text: str) -> None:
        self.result.warnings.append(text)

    def _name(self, node: int) -> str:
        names = {number: report.name for number, report in self.reports.items()}
        return verdict.names_of(self.task.nodes, self.task.listed, names)[node]

    def _conclude(self) -> None:
        best = verdict.better(self.pairs)
        for node in range(self.task.nodes):
            row: dict[str, Any] = {"node": node, "name": self._name(node), "faults": self.faults.get(node, [])}
            if node in self.reports:
                report = self.reports[node]
                row |= {"disk": report.disk, "memory": report.memory, "matmul": list(report.matmul),
                        "skew": report.skew, "bandwidth": best.get(node)}  # fmt: skip
            self.result.nodes.append(row)
        self.result.bad = [self._name(node) for node in sorted(self.faults)]
        self.result.seconds = time.monotonic() - self.began
        print(verdict.table(self.result.nodes, self.result.seconds), flush=True)
        for warning in self.result.warnings:
            print(f"[shoestring] pre-flight: {warning}", flush=True)
        replace_file(self.task.folder / "preflight.json", json.dumps(self.result.__dict__, indent=1))

    def _announce(self) -> None:
        """Give the verdict, and keep the store until everybody has read it, or everybody who may still come."""
        self.store.set("verdict", json.dumps(self.result.__dict__))
        for node in self.reports:
            self.store.set(f"request/{node}/{self._sequence.get(node, 0)}", json.dumps({"what": "end"}))
        others = self.task.nodes * self.task.devices - 1
        end = time.monotonic() + 3 if self.faults else max(self.began + self.task.timeout, time.monotonic() + 3)
        while others and int(self.store.add("read", 0)) < others and time.monotonic() < end:
            time.sleep(0.02)


def _place(folder: Path) -> tuple[Path, int]:
    """(job's folder, attempt) of the folder of an attempt."""
    return folder.parent.parent, int(folder.name)
