"""What a plan, a page of help and a run load, and that a plan without torch says what one with it would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
from declarations import declarations
from shipped import leave_own_data

from shoestring import ShoestringError
from shoestring.callbacks.catalog.registry import TECHNIQUES, declare, ready, technique_class
from shoestring.callbacks.contract import Technique
from shoestring.recipes import load_recipe, shipped_recipes
from shoestring.trainer import fit, plan
from shoestring.trainer.machine.facts import _NODES
from shoestring.trainer.planning.sizes import size_of
from shoestring.trainer.tasks import build_task

pytestmark = pytest.mark.filterwarnings("ignore")

# changes to a recipe that a plan refuses, each for a reason of its own
REFUSED = {
    "setting": ["techniques.gradual_pruning.sparsity=1.5"],
    "no such setting": ["techniques.gradual_pruning.sparsty=0.5"],
    "no such technique": ["techniques=[gradual_prunning]"],
    "no duration": ["techniques=[{weight_averaging: {start: '2 fortnights'}}]"],
    "wrong type": ["techniques=[{set: {sparsity: much}}]"],
    "two writers": ["techniques=[rigl, set]"],
    "a rule": ["techniques=[quantization_aware, weight_clustering]"],
    "not here": ["precision=fp16"],
    "optimizer": ["optimizer.name=moun", "strategy.name=zero2", "strategy.devices=2"],
    "teacher": ["techniques=[{distillation: {teacher: ''}}]"],
    "dtype": ["techniques=[{distillation: {teacher_dtype: float8}}]"],
}


def light(code: str, cwd: Path) -> str:
    """What `code` prints in a process of its own, which has loaded neither torch nor Lightning before nor after it."""
    heavy = "('torch', 'pytorch_lightning', 'lightning_fabric', 'transformers', 'torchmetrics', 'wandb', 'deepspeed')"
    check = f"{code}\nimport sys\nheavy = [m for m in {heavy} if m in sys.modules]\nassert not heavy, heavy\n"
    env = {**os.environ, "SHOESTRING_HOME": str(cwd / "home")}
    done = subprocess.run([sys.executable, "-c", check], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def no_gpu() -> None:
    if any(os.path.exists(node) for node in _NODES):
        pytest.skip("where a GPU is present, a plan asks torch about it")


def test_plans_of_all_shipped_recipes_load_no_torch(tmp_path: Path) -> None:
    no_gpu()
    leave_own_data(tmp_path)
    code = "import sys\nfrom shoestring.trainer.cli import main\n"
    code += "def run(*words):\n    sys.argv = ['shoestring', *words]\n    try: main()\n"
    code += "    except SystemExit as ended: assert not ended.code\n"
    code += "".join(f"run('plan', {name!r})\n" for name in shipped_recipes())
    code += "run('plan', 'quickstart', '--json'); run('--help'); run('recipes', 'list')\n"
    said = light(code, tmp_path)
    assert all(f"plan: {name} (" in said for name in shipped_recipes())


def test_a_declaration_says_what_the_technique_says(tmp_path: Path) -> None:
    support = str(Path(__file__).parents[2] / "support")
    code = f"import json, sys\nsys.path.insert(0, {support!r})\nfrom declarations import declarations\n"
    declared = json.loads(light(f"{code}print(json.dumps(declarations()))\n", tmp_path))
    assert issubclass(type(declare("rigl")), pl.Callback), "where Lightning is loaded, techniques are the real ones"
    assert declared == declarations()
    assert declared.keys() == TECHNIQUES.keys()


def test_techniques_are_lightning_callbacks_before_and_after_a_plan(tmp_path: Path) -> None:
    code = """
from shoestring.recipes import load_recipe
from shoestring.trainer import plan
made = plan(load_recipe("quickstart"))
again = plan(load_recipe("quickstart"))
assert [type(t) for t in made.declared] == [type(t) for t in again.declared]
try:
    made.declared[0].on_train_batch_start(*[None] * 4)
except Exception as error:
    print(type(error).__name__)
assert "torch" not in __import__("sys").modules
"""
    no_gpu()
    light(code, tmp_path)
    code += """
from shoestring.callbacks import LRSchedule, RigL
import pytorch_lightning as pl
assert all(isinstance(t, pl.Callback) for t in made.techniques)
assert [repr(t) for t in made.techniques] == [repr(t) for t in made.declared]
assert made.techniques[0] is made.techniques[0] and isinstance(made.techniques[0], LRSchedule)
assert issubclass(RigL, pl.Callback) and not isinstance(made.declared[0], pl.Callback)
third = plan(load_recipe("quickstart"))
assert all(isinstance(t, pl.Callback) for t in third.declared)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_declaration_raises_when_it_is_trained(tmp_path: Path) -> None:
    code = """
from shoestring.callbacks.catalog.registry import declare
technique = declare("weight_averaging")
try:
    import sys
    sys.modules[type(technique).__module__]
except KeyError:
    print("forgotten")
try:
    type(technique).on_train_start.__globals__["torch"].zeros(3)
except RuntimeError as error:
    print(error)
"""
    said = light(code, tmp_path)
    assert "forgotten" in said and "a plan has no torch" in said


def test_ready_leaves_a_users_technique_alone() -> None:
    class Own(Technique, pl.Callback):
        card = technique_class("rigl").card  # even under a name that is taken

    own = Own()
    assert ready(own) is own


def refusal(changes: list[str]) -> str:
    try:
        plan(load_recipe("digits", changes))
    except ShoestringError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_what_a_light_plan_refuses_is_what_any_plan_refuses(tmp_path: Path) -> None:
    no_gpu()
    code = "import json\nfrom shoestring import ShoestringError\nfrom shoestring.recipes import load_recipe\n"
    code += "from shoestring.trainer import plan\nsaid = {}\n"
    code += f"for name, changes in {REFUSED!r}.items():\n    try:\n        plan(load_recipe('digits', changes))\n"
    code += "        said[name] = 'accepted'\n"
    code += "    except ShoestringError as error:\n        said[name] = f'{type(error).__name__}: {error}'\n"
    said = json.loads(light(code + "print(json.dumps(said))\n", tmp_path))
    assert said == {name: refusal(changes) for name, changes in REFUSED.items()}
    assert "accepted" not in said.values()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `runs/` holds what quickstart and finetune-minilm leave: of the right kind, untrained."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("models")
    task = build_task(load_recipe("quickstart"), workdir=folder)
    task.module.model.save_pretrained(folder / "runs/quickstart/model")
    task.tokenizer.save_pretrained(folder / "runs/quickstart/model")
    small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    tokenizer = AutoTokenizer.from_pretrained(folder / "runs/quickstart/model")
    config = BertConfig(vocab_size=len(tokenizer), num_labels=10, **small)
    BertForSequenceClassification(config).save_pretrained(folder / "runs/finetune-minilm/model")
    tokenizer.save_pretrained(folder / "runs/finetune-minilm/model")
    leave_own_data(folder)
    return folder


# the size of a convolutional network is not counted
@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name != "images"])
def test_the_counted_size_is_the_models(name: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    recipe = load_recipe(name)
    counted, built = size_of(recipe), build_task(recipe, workdir=models).facts
    assert (counted.parameters, counted.trainable) == (built["parameters"], built["trainable"])


def test_a_run_loads_only_what_it_needs(tmp_path: Path) -> None:
    """Packages that others import at their top, and that a run of quickstart does not use."""
    code = """
import sys
sys.argv = ["shoestring", "train", "quickstart", "budget={steps: 2}", "strategy.devices=1", "data.limit=20",
            "evaluation={at_end: false}", "export=null", "model.tokenizer.vocab_size=300"]
from shoestring.trainer.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
unused = ["torchmetrics.functional", "scipy.signal", "scipy.optimize._optimize", "torch._inductor.compile_fx", "wandb",
          "datasets", "pandas", "peft", "sklearn", "networkx", "torch.utils.tensorboard"]
found = [name for name in unused if name in sys.modules]
assert not found, found
import torchmetrics, scipy.optimize
assert torchmetrics.Accuracy and torchmetrics.functional.accuracy
assert torchmetrics.Metric.__module__ == "torchmetrics.metric"
assert scipy.optimize.minimize and scipy.optimize.linear_sum_assignment
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


def test_startup_counts_from_the_call_to_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoestring.trainer.tasks import build

    prepare = build.prepare

    def slow(*args):
        time.sleep(1.5)
        return prepare(*args)

    monkeypatch.setattr(build, "prepare", slow)
    changes = ["budget={steps: 2}", "strategy.name=single", "tracking.ledger=false", "evaluation.at_end=false"]
    report = fit(plan(load_recipe("digits", changes)), run_dir=tmp_path, startup_seconds=100.0)
    assert report is not None
    assert report.summary["windows"]["startup"] >= 101.5
