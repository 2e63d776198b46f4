"""`shoestring init`: what it asks, what it sees, what it writes, and that this runs as it stands."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import chatting
import pytest
from command_line import command

from shoestring.recipes import load_recipe, recipe_schema
from shoestring.trainer import plan
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.data.look import look_at
from shoestring.trainer.machine.facts import Accelerator, Machine, facts
from shoestring.trainer.planning.first_recipe import CannotStart, RecipeRequest, budget_key, first_recipe

pytestmark = pytest.mark.filterwarnings("ignore")
CHAT = {"messages": [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "one!"}]}
LLAMA = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, and rows of every kind."""
    monkeypatch.chdir(tmp_path)
    chatting.base(tmp_path / "model")
    Path("chats.jsonl").write_text("\n".join([json.dumps(CHAT)] * 60))
    Path("asked.csv").write_text("question,answer\n" + "How many?,Two.\n" * 30)
    Path("alpaca.json").write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}] * 9))
    Path("rows.csv").write_text("review,stars\n" + "good,5\nbad,1\n" * 50)
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("It is a note. " * 200)
    return tmp_path


def model(name: str, **shape: int) -> str:
    """A folder that has a model's settings alone."""
    Path(name).mkdir()
    Path(name, "config.json").write_text(json.dumps({**LLAMA, **shape}))
    return f"./{name}"


@pytest.mark.parametrize(
    ("source", "kind", "shape", "rows"),
    [
        ("chats.jsonl", "chats", "messages", 60), ("asked.csv", "chats", "question-answer", 30),
        ("alpaca.json", "chats", "alpaca", 9), ("notes", "texts", None, 1), ("rows.csv", "labels", None, 100),
        ("owner/set", "unknown", None, 0), ("python-docstrings", "chats", "messages", 2000),
    ],
)  # fmt: skip
def test_rows_are_recognised_as_training_reads_them(source: str, kind: str, shape: str | None, rows: int) -> None:
    look = look_at(source)
    assert (look.kind, look.shape, look.rows) == (kind, shape, rows)
    assert look.all == (rows < 2000)
    if source == "rows.csv":
        assert (look.text_column, look.label_column) == ("review", "stars")


def test_flags_alone_write_a_recipe_that_is_planned_as_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["init", "mine.yaml", "--model", "./model", "--data", "chats.jsonl", "--budget", "2 min"]
    assert command(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert "60 rows of questions and answers (messages)" in said and "next         shoestring train mine.yaml" in said
    text, recipe = Path("mine.yaml").read_text(), load_recipe("mine.yaml")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert json.loads(Path("recipe.schema.json").read_text()) == json.loads(json.dumps(recipe_schema()))
    assert sum("#" in line for line in text.splitlines()) > 10
    assert (recipe.model.name, recipe.data.source, recipe.budget.hours) == ("./model", "chats.jsonl", 2 / 60)
    assert recipe.data.sequence_length <= 128, "what the model reads"
    assert plan(recipe).predictions["steps"] > 0
    Path("mine.yaml").write_text("mine")
    assert command(monkeypatch, *words) == 2
    assert "is there already, and is not replaced" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "mine"


def test_four_questions_are_asked_through_a_pipe_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("./model\nrows.csv\n$2\n\n"))
    assert command(monkeypatch, "init", "stars.yaml") == 0
    printed = capsys.readouterr().out
    assert all(
        f"{question}?" in printed for question in ("Which model", "Which data", "How much may it spend", "What for")
    )
    recipe = load_recipe("stars.yaml")
    assert recipe.model.task == "sequence-classification" and recipe.budget.usd == 2
    assert (recipe.data.text_column, recipe.data.label_column) == ("review", "stars")
    monkeypatch.setattr("sys.stdin", io.StringIO("./model\n"))
    assert command(monkeypatch, "init", "none.yaml") == 2
    assert "error: --data is missing, and nobody answers" in capsys.readouterr().err
    assert not Path("none.yaml").exists()


def on_gpu(gib: int) -> Machine:
    """This machine with a GPU."""
    gpu = Accelerator("a GPU", gib * 2**30, "h100-sxm")
    return replace(facts(), accelerators=(gpu,), hardware="h100-sxm", bf16=True, fp16=True)


def test_the_way_to_train_is_the_first_that_fits_the_machine() -> None:
    wide = {"num_hidden_layers": 32, "num_attention_heads": 32}
    sizes = {
        "small": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4},
        "large": {"hidden_size": 2048, "intermediate_size": 5632, **wide},
        "larger": {"hidden_size": 4096, "intermediate_size": 11008, **wide},
    }
    ways = {}
    for name, shape in sizes.items():
        made = first_recipe(RecipeRequest.of(model(name, **shape), "chats.jsonl", "1000 h", None), name, on_gpu(10))
        ways[name] = made.way
        Path(f"{name}.yaml").write_text(made.text)
        recipe = load_recipe(f"{name}.yaml")
        assert (recipe.model.adapter is None, recipe.model.dtype == "nf4") == (made.way == "full", made.way == "qlora")
        assert plan(recipe, on_gpu(10)).fitted.possible  # type: ignore[union-attr]
    assert ways == {"small": "full", "large": "lora", "larger": "qlora"}
    with pytest.raises(CannotStart, match=r"nothing fits on this machine.*it does not fit in memory: needs"):
        first_recipe(RecipeRequest.of("./larger", "chats.jsonl", "1 h", None), "x", on_gpu(2))


def test_a_model_that_is_still_to_be_downloaded_is_trained_by_adapters_at_a_rate_for_large_ones() -> None:
    made = first_recipe(RecipeRequest.of("owner/unknown", "chats.jsonl", "1 h", None), "x")
    assert made.way == "lora" and made.passes is None and "lr: 2e-4" in made.text
    assert any("whether owner/unknown fits in memory is not known" in warning for warning in made.plan.warnings)


def test_every_kind_of_budget_has_its_key() -> None:
    keys = [budget_key(text) for text in ("$5", "30 min", "2 epochs", "500 steps", "1e6 tokens", "0.2 kWh")]
    assert keys == ["usd", "hours", "epochs", "steps", "tokens", "kwh"]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"budget": "5 fortnights"}, "--budget '5 fortnights'"), ({"budget": "5"}, "an amount above 0 with its unit"),
        ({"budget": "40%"}, "with its unit"), ({"purpose": "clasify"}, "did you mean classify"),
        ({"purpose": "classify"}, "holds chats, for chat"),
        ({"model": "./nowhere"}, "--model: './nowhere' is no folder"),
        ({"data": "./none/*.jsonl"}, "--data './none/*.jsonl' matches no file"), ({"data": "odd.csv"}, "columns a, b"),
        ({"data": "owner/set"}, "say what it is for"),
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_that_cannot_be_is_one_line_that_names_its_flag(answers: dict[str, str], said: str) -> None:
    Path("odd.csv").write_text("a,b\n1,2\n")
    given = {"model": "./model", "data": "chats.jsonl", "budget": "1 h", "purpose": None, **answers}
    with pytest.raises((CannotStart, TaskError)) as raised:
        RecipeRequest.of(**given)  # type: ignore[arg-type]
    assert said in str(raised.value) and str(raised.value).startswith("--") and "\n" not in str(raised.value)
