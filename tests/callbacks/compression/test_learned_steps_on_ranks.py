"""Learned step sizes under every strategy: the same steps as on one device, resumed bit for bit, through a cut too."""

import json
import traceback
import warnings
from collections import Counter

import pytest
import pytorch_lightning as pl
from processes import succeed
from ranks import ACCUMULATE, CHECKPOINT, Group, counted

from shoestring.callbacks import QuantizationAware, StructuredPruning

STRATEGIES = {"single": 1, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2}
CASES = {  # without activations, of which one that is rounded the other way shows in the sixth digit
    "lsq": lambda: [QuantizationAware(weight_bits=4, scale="lsq", start="2 steps")],
    "lsq-cut": lambda: [
        StructuredPruning(ratio=0.5, at="4 steps", round_to=2), QuantizationAware(weight_bits=4, scale="lsq"),
    ],
}  # fmt: skip


class Steps(pl.Callback):
    """The technique's state at the end of the run."""

    def on_train_end(self, trainer, pl_module):
        self.state_at_end = next(c for c in trainer.callbacks if isinstance(c, QuantizationAware)).state_dict()


def rank(strategy, folder):
    warnings.simplefilter("ignore")
    group, results = Group(strategy, folder), {}
    for case, techniques in CASES.items():
        steps = Steps()
        try:
            results[case] = group.resume(case, techniques)
            results[case]["still"] = group.train(f"{case}-still", *techniques(), dropout=0.0, callbacks=(steps,))
            results[case]["steps"] = steps.state_at_end
        except Exception:
            results[case] = {"error": traceback.format_exc()}
    if strategy == "ddp":
        results["collectives"] = {"per_step": collectives(group)}
    (folder / f"rank-{group.rank}.json").write_text(json.dumps(results))


def collectives(group):
    """What Python asks of torch.distributed per step in the middle of a run."""
    counts: Counter = Counter()

    class Middle(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            counts["on"] = int(4 <= trainer.global_step < 8)

    with counted(counts):
        group.train("collectives", *CASES["lsq"](), callbacks=(Middle(),), limit_val_batches=0)
    return {name: n / 4 for name, n in counts.items() if name != "on"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    known = {}

    def train_under(strategy):
        if strategy not in known:
            folder, world = tmp_path_factory.mktemp(strategy), STRATEGIES[strategy]
            succeed(rank, strategy, folder, world=world, folder=folder, timeout=400)
            known[strategy] = [json.loads((folder / f"rank-{r}.json").read_text()) for r in range(world)]
        for report in known[strategy]:
            assert all("error" not in case for case in report.values()), report
        return known[strategy]

    return train_under


def losses(reports, case):
    each = [report[case]["still"]["losses"] for report in reports]
    micro = [sum(of_ranks) / len(each) for of_ranks in zip(*each, strict=True)]
    return [sum(micro[i : i + ACCUMULATE]) / ACCUMULATE for i in range(0, len(micro), ACCUMULATE)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumes_bit_for_bit_and_alike_on_all_ranks(strategy, case, ran):
    reports = [report[case] for report in ran(strategy)]
    for report in reports:
        whole, resumed = report["whole"], report["resumed"]
        assert resumed["resumed_from"] == CHECKPOINT
        assert resumed["losses"] == whole["losses"][CHECKPOINT * ACCUMULATE :]
        for kept in ("final", "masters", "validations"):
            assert resumed[kept] == (whole[kept] if kept != "validations" else [v for v in whole[kept] if v[0] > 5])
    assert all(report["steps"] == reports[0]["steps"] for report in reports)
    assert len({report["whole"]["masters"] for report in reports}) == 1


def test_one_sum_a_step_is_all_that_is_added(ran):
    """Besides the asynchronous one of signals, budget and counters."""
    for report in ran("ddp"):
        assert report["collectives"]["per_step"] == {"all_reduce": 1.0, "all_reduce blocking": 1.0}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "single"])
def test_steps_and_losses_are_those_of_one_device(strategy, case, ran):
    alone, together = ran("single"), ran(strategy)
    drift = [abs(a - b) for a, b in zip(losses(alone, case), losses(together, case), strict=True)]
    assert max(drift) < 2e-5
    expected = alone[0][case]["steps"]
    assert expected["count"] == (10 if case == "lsq" else 12) and len(expected["layers"]) == 5
    for name, layer in expected["layers"].items():
        assert together[0][case]["steps"]["layers"][name]["steps"] == pytest.approx(layer["steps"], rel=1e-5), name
    rows = len(expected["layers"]["blocks.0.wide.weight"]["steps"])
    assert rows == 23 if case == "lsq" else rows < 23
