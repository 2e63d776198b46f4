"""A plan names what is missing on this machine, with file and line, as the run would."""

from pathlib import Path

import pytest

from shoestring.recipes import RecipeError, load_recipe
from shoestring.trainer import plan
from shoestring.trainer.run.fit import NoRunDirectory, _writable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.source=./absent/*.txt", r"data\.source.*matches no file here"),
        ("data.source=absent.csv", r"data\.source.*matches no file here"),
        ("data.validation=./absent.txt", r"data\.validation.*matches no file here"),
        ("model.tokenizer=./absent", r"model\.tokenizer.*is no folder here"),
    ],
)
def test_a_plan_names_what_is_missing(change: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(load_recipe("quickstart", [change]))


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NoRunDirectory, match=r"cannot write in .*file/run: .*Choose another --run-dir"):
        _writable(tmp_path / "file" / "run")
    _writable(tmp_path / "new" / "run")
    assert list((tmp_path / "new" / "run").iterdir()) == []
