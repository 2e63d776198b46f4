"""`deterministic: true`: torch's deterministic algorithms while a run lasts, which change nothing on a CPU."""

import pytest
import pytorch_lightning as pl
import torch
from toy import fingerprint

from shoestring.recipes import load_recipe
from shoestring.trainer import fit, plan
from shoestring.trainer.checkpoint.weights import load_weights
from shoestring.trainer.run.determinism import NotDeterministic, deterministic_algorithms

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
FEW = ["budget={steps: 3}", "strategy.name=single", "tracking.ledger=false", "evaluation.at_end=false"]


class Seen(pl.Callback):
    """Whether the steps of a run are computed by deterministic algorithms."""

    def __init__(self):
        self.deterministic = set()

    def on_train_batch_start(self, *args):
        self.deterministic.add(torch.are_deterministic_algorithms_enabled())


def test_a_run_is_computed_by_them_and_has_the_same_weights_on_a_cpu(tmp_path):
    finals = {}
    for wanted in (False, True):
        recipe = load_recipe("digits", [*FEW, f"deterministic={str(wanted).lower()}"])
        seen = Seen()
        fit(plan(recipe), run_dir=tmp_path / str(wanted), callbacks=[seen])
        assert seen.deterministic == {wanted}
        assert not torch.are_deterministic_algorithms_enabled(), "only while the run lasts"
        finals[wanted] = fingerprint(load_weights(tmp_path / str(wanted) / "final"))
    assert finals[True] == finals[False]


def test_what_has_no_deterministic_form_is_named():
    places = torch.tensor([0, 0])
    refused = pytest.raises(NotDeterministic, match="the model uses put_, which torch has no deterministic form of")
    with refused, deterministic_algorithms(True):
        torch.zeros(2).put_(places, torch.ones(2))
    with deterministic_algorithms(False):
        torch.zeros(2).put_(places, torch.ones(2))


def test_other_errors_and_what_was_set_before_stay():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(RuntimeError, match="of its own"), deterministic_algorithms(True):
            raise RuntimeError("of its own")
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("hardware", "wanted", "said"),
    [
        ("cpu", "true", "changes nothing on a CPU"),
        ("h100", "true", "is slower"),
        ("h100", "false", "unless deterministic: true"),
    ],
)
def test_the_plan_says_what_it_costs(hardware, wanted, said):
    recipe = load_recipe("digits", [*FEW, f"deterministic={wanted}", f"cluster.hardware={hardware}"])
    (choice,) = [c for c in plan(recipe).choices if c.what == "deterministic"]
    assert choice.value == wanted and said in choice.why
