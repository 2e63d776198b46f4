"""Every registered optimizer under every strategy that its card names: trains, resumes to the bit, equals one device.

The trainings are in tests/support/optimizer_ranks.py; what must hold of them is said here.
"""

import json
from functools import cache

import optimizer_ranks
import pytest
import torch
from processes import last_words, succeed
from toy import DEVICE

from shoestring.callbacks.contract import MIXING
from shoestring.strategies import OFFLOADS
from shoestring.trainer.checkpoint.state import OtherShards
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.tasks.optimizers.cards import OPTIMIZERS

pytestmark = pytest.mark.filterwarnings("ignore")
RANKS = 2 if DEVICE == "cpu" or torch.cuda.device_count() > 1 else 1
STRATEGIES = {name: 1 if name == "single" else RANKS for name in OFFLOADS}
LEGAL = [(strategy, name) for strategy in STRATEGIES for name in OPTIMIZERS if strategy in OPTIMIZERS[name].strategies]
SEVERAL = [(strategy, name) for strategy, name in LEGAL if STRATEGIES[strategy] > 1]
# A moment that lies between two codes may fall to either, and blocks of shards are others than blocks of matrices. With
# this suite's settings, eight steps of one device on the parts of a vector are equal to the bit where it is cut between
# blocks, and 8.1e-4 (8 bits) or 1.1e-2 (4 bits) apart where it is cut within one. ZeRO cuts a vector of all parameters
# evenly: blocks that begin with each parameter would reach into the next rank's shard, and ask it for their largest.
DRIFT = {"adamw8bit": 2e-3, "adamw4bit": 2e-2, "apollo": 1e-5}
IN_BYTES = {"adamw8bit", "adamw4bit"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """strategy, optimizer -> what each rank reports; trained when first asked for."""

    @cache
    def train(strategy):
        folder = tmp_path_factory.mktemp(strategy)
        world = STRATEGIES[strategy]
        succeed(optimizer_ranks.main, strategy, folder, world=world, folder=folder, timeout=500)
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)], folder

    def case(strategy, name):
        reports, folder = train(strategy)
        assert "error" not in reports[0][name], f"{reports[0][name]['error']}\n{last_words(folder)}"
        return [report[name] for report in reports]

    case.folder = lambda strategy: train(strategy)[1]
    return case


def losses(reports) -> list[float]:
    return [sum(each) / len(each) for each in zip(*(report["whole"]["losses"] for report in reports), strict=True)]


def apart(ran, strategy, name) -> float:
    """How far final weights are from those of one device, and losses in training and in validation."""
    alone, together = (
        losses(ran(each, name)) + ran(each, name)[0]["whole"]["validations"] for each in ("single", strategy)
    )
    finals = [load_weights(ran.folder(each) / f"{name}-whole" / "final") for each in ("single", strategy)]
    assert finals[0].keys() == finals[1].keys() and finals[0]
    weights = max(float((finals[0][key] - finals[1][key]).abs().max()) for key in finals[0])
    return max(weights, *(abs(a - b) for a, b in zip(alone, together, strict=True)))


def resumes(reports) -> bool:
    for report in reports:
        whole, resumed = report["whole"], report["resumed"]
        if resumed["losses"] != whole["losses"][optimizer_ranks.HALF :]:
            return False
        if any(resumed[key] != whole[key] for key in ("final", "states")):
            return False
    return True


@pytest.mark.parametrize(("strategy", "name"), LEGAL)
def test_trains(strategy, name, ran):
    reports = ran(strategy, name)
    course = losses(reports)
    assert len(course) == optimizer_ranks.STEPS and course[-1] < 0.95 * course[0]
    validations = reports[0]["whole"]["validations"]
    assert validations[-1] < validations[0]


@pytest.mark.parametrize(("strategy", "name"), LEGAL)
def test_resumes_bit_for_bit(strategy, name, ran):
    reports = ran(strategy, name)
    assert len(reports[0]["resumed"]["losses"]) == optimizer_ranks.STEPS - optimizer_ranks.HALF
    assert resumes(reports)


@pytest.mark.parametrize(("strategy", "name"), SEVERAL)
def test_trains_like_one_device(strategy, name, ran):
    stable = optimizer_ranks.STABLE.get(name, name)
    assert apart(ran, strategy, stable) < DRIFT.get(name, 1e-6)


@pytest.mark.parametrize(("strategy", "name"), LEGAL)
def test_holds_the_bytes_that_its_card_says(strategy, name, ran):
    """Of all ranks together, each of which has at most its share and what pads it."""
    shapes = [p.shape for p in optimizer_ranks.Net(None).parameters()]
    card, world = OPTIMIZERS[name], STRATEGIES[strategy]
    split = sum(n.numel() * (card.bytes_of_matrices if len(n) > 1 else card.state_bytes) for n in shapes)
    copies = world if strategy == "ddp" else 1
    cut = strategy not in ("single", "ddp")
    if name in IN_BYTES:  # what is small stays as it is: parameters, or under ZeRO the shard of all vectors
        whole_ones = strategy in ("single", "ddp", "fsdp2")
        small = [n.numel() for n in shapes if (n.numel() < 4096 if whole_ones else len(n) < 2)]
        split += (8 - card.state_bytes) * sum(small)
    if name == "adafactor":  # a vector is kept itself
        split = 4.0 * sum(n.numel() for n in shapes if len(n) < 2)
    whole = sum(kept_whole(name, *n) for n in shapes if len(n) > 1)
    held = [report["whole"]["held"] for report in ran(strategy, name)]
    # a matrix that two ranks have a part of is kept whole by both
    assert 0.99 * copies * (split + whole) <= sum(held)
    assert sum(held) <= 1.03 * copies * split + (world if cut else copies) * whole
    assert max(held) <= (0.55 if cut else 1.03) * split + whole


def kept_whole(name: str, rows: int, columns: int) -> float:
    """Bytes of a matrix that every rank with a part of it keeps; never more than the card says."""
    short, rank = min(rows, columns), max(1, min(rows, columns) // 4)
    card, several = OPTIMIZERS[name], rank > 1
    if name == "adafactor":  # two vectors
        return 4.0 * (rows + columns)
    if name == "soap":  # products and eigenvectors of both sides
        assert card.side_bytes == 8
        return 8.0 * (rows**2 + columns**2)
    if name in ("galore", "apollo"):  # two moments of the projection, and what projects
        held = 8.0 * rank * max(rows, columns) + (4.0 * rank * short if name == "galore" else 0.0)
        assert not several or held <= card.whole_bytes * rows * columns
        return held
    assert not card.whole_bytes and not card.side_bytes
    return 0.0


@pytest.mark.parametrize(("strategy", "masters", "weights"), [
    ("single", 0, 1), ("ddp", 0, 1), ("zero1", 1, 1), ("zero2", 1, 1), ("zero3", 1, 0.5), ("fsdp2", 1, 0.5),
])  # fmt: skip
def test_masters_and_gradients_are_bytes_of_their_own(strategy, masters, weights, ran):
    """4 a parameter each in float32, beside the state; what ZeRO shares out is counted over its ranks."""
    four = sum(4 * p.numel() for p in optimizer_ranks.Net(None).parameters())
    each = [report["whole"] for report in ran(strategy, "adamw")]
    assert sum(report["masters"] for report in each) == pytest.approx(masters * four, rel=0.01)
    shared = len(each) if strategy in ("single", "ddp") else 1
    assert sum(report["gradients"] for report in each) == pytest.approx(shared * four, rel=0.01)
    assert all(report["weights"] == pytest.approx(weights * four, rel=0.01) for report in each)


@pytest.mark.parametrize(("strategy", "name"), [case for case in LEGAL if case[0] == "zero2" and case[1] not in MIXING])
def test_what_is_pruned_stays_zero(strategy, name, ran):
    """Weights, and what the optimizer keeps of them, are zero together: its step then moves neither."""
    ran(strategy, name)
    final = load_weights(ran.folder(strategy) / f"{name}-pruned" / "final")
    pruned = torch.cat([final[f"net.{layer}.weight"].view(-1) for layer in (0, 2)])
    assert float((pruned == 0).float().mean()) == pytest.approx(0.6, abs=0.01)
    assert bool(final["net.4.weight"].all())


def test_blocks_of_shards_go_with_no_others(ran, monkeypatch):
    folder = ran.folder("zero2")
    monkeypatch.setenv("WORLD_SIZE", "1")
    went_on = optimizer_ranks.train("single", "lion", folder / "lion-again", optimizer_ranks.STEPS + 2, 4)
    assert len(went_on["losses"]) == 4, "two steps of two micro-batches each"
    for name in sorted(IN_BYTES):
        with pytest.raises(OtherShards, match="of shards of zero1 or zero2 on 2 ranks, and this run has whole"):
            optimizer_ranks.train("single", name, folder / f"{name}-again", optimizer_ranks.STEPS + 2, 4)


def test_what_is_wrong_with_an_optimizer_is_found(ran):
    assert not resumes(ran("single", "Forgetful")), "momentum that nobody saves"
    assert apart(ran, "zero2", "OfWholes") > 1e-4, "a norm of a shard"
    assert resumes(ran("single", "OfWholes")) and resumes(ran("zero2", "OfWholes"))


def test_a_fused_optimizer_is_clipped_under_mixed_precision(ran):
    course = ran("single", "bf16")[0]["losses"]
    assert course[-1] < course[0]
