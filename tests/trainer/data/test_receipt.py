"""What a run is about to learn, counted and shown before anything is spent."""

import json

import pytest
from rich.console import Console

from shoestring.recipes import load_recipe
from shoestring.trainer.cli.receipt_display import show_receipt
from shoestring.trainer.data.errors import TaskError
from shoestring.trainer.run.receipt import receipt_of

ROWS = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(20)]


@pytest.fixture
def receipt(tmp_path):
    def made(rows, *overrides, held=None):
        for name, part in (("rows", rows), ("held", held)):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part or ())))
        held_out = tmp_path / "held.jsonl" if held else 0
        changes = [f"data.source={tmp_path / 'rows.jsonl'}", f"data.validation={held_out}", "data.sequence_length=64"]
        changes.append("model.tokenizer={train: bpe, vocab_size: 300}")
        return receipt_of(load_recipe("quickstart", [*changes, *overrides]), tmp_path / "run")

    return made


def test_counts_and_samples_are_those_of_the_data(receipt):
    plain = receipt(ROWS, "data.pack=false", held=[*ROWS[:3], {"question": "New?", "answer": "Yes."}])
    assert (plain.samples, plain.documents, plain.validation_samples, plain.duplicates) == (20, 20, 4, 3)
    trained = "".join(text for text, is_trained in plain.shown[0] if is_trained)
    assert trained == "It is 0.<|endoftext|>"
    whole = "".join(text for text, _ in plain.shown[0])
    assert whole == "### User:\nWhat is 0?\n\n### Assistant:\nIt is 0.<|endoftext|>\n\n"
    assert plain.lengths[5] <= plain.lengths[50] <= plain.lengths[100] < 64
    assert 0 < plain.trained_share < 0.5 and plain.padding == 0
    packed = receipt(ROWS, "data.sequence_length=128")
    assert packed.samples < 20 == packed.documents and packed.padding > 0
    assert (packed.tokens, packed.trained_tokens) == (plain.tokens, plain.trained_tokens)


def test_what_is_shown_marks_what_is_trained(receipt, capsys):
    show_receipt(receipt(ROWS, "data.pack=false").as_dict(), Console(width=200))
    said = capsys.readouterr().out
    assert "### Assistant:\n⟦It is 0.<|endoftext|>⟧\n" in said
    assert "data: 20 samples to train on, 0 held out; 20 documents" in said and "% of them trained on" in said


def test_rows_that_are_left_out_are_counted(receipt):
    noise = "".join(chr(33 + i * 37 % 90) for i in range(200))  # which no token spells several characters of
    far, long = {"question": noise, "answer": "never seen"}, {"question": "Say much", "answer": noise}
    plain = receipt([*ROWS, far, long], "data.pack=false")
    assert plain.left_out == {"rows_cut": 2, "rows_without_target": 1} and plain.documents == 21


@pytest.mark.parametrize(
    ("rows", "overrides", "said"),
    [
        ([{"question": "long " * 60, "answer": "never"}] * 3, (), "has .* not one sample"),
        ([{"prompt": "", "completion": "all of it"}] * 3, (), "all tokens are answers, none is asked"),
    ],
)
def test_data_of_which_nothing_or_everything_is_trained_on_is_refused(receipt, rows, overrides, said):
    with pytest.raises(TaskError, match=said):
        receipt(rows, *overrides)


def test_classes_and_images_have_one_too(receipt, tmp_path):
    rows = [{"text": f"good {i}" if i % 3 else f"bad {i}", "label": "yes" if i % 3 else "no"} for i in range(12)]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = ["data.validation=0", "goal=null", f"data.source={tmp_path / 'labelled.jsonl'}"]
    labelled = receipt_of(load_recipe("finetune-minilm", changes), tmp_path / "run")
    assert labelled.classes == {"no": 4, "yes": 8} and labelled.shown[0][-1] == (" → no", True)
    digits = receipt_of(load_recipe("digits", []), tmp_path / "images")
    assert digits.samples + digits.validation_samples == 1797 and sum(digits.classes.values()) == digits.samples
