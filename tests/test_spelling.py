"""The word that was meant, or none: a wrong guess costs the reader more than no guess."""

from __future__ import annotations

import pytest

from shoestring.spelling import all_near, did_you_mean, distance, most_similar, nearest

UNITS = ("s", "min", "h", "days", "steps", "epochs", "tokens")


@pytest.mark.parametrize(
    ("word", "meant"), [("stesp", "steps"), ("TOKEN", "tokens"), ("mn", "min"), ("x", None), ("fortnights", None)]
)
def test_the_nearest_word(word: str, meant: str | None) -> None:
    assert nearest(word, UNITS) == meant
    assert did_you_mean(word, UNITS) == (f"did you mean {meant}?" if meant else "")


def test_of_several_the_likeliest_comes_first() -> None:
    assert all_near("rtx4090", ["rtx-5090", "rtx-4090", "h100", "rtx-3090"]) == ["rtx-4090", "rtx-3090", "rtx-5090"]
    assert all_near("word", []) == []


def test_distance_counts_swapped_neighbours_once() -> None:
    assert [distance("", "ab"), distance("porj", "proj"), distance("kitten", "sitting")] == [2, 1, 3]
    assert distance("a", "a" * 10_000) == 60, "no table of a pasted page"


def test_a_pattern_is_like_some_name() -> None:
    assert most_similar("hed.*", ["body.0.weight", "head.weight"]) == "head.weight"
    assert most_similar("hed.*", []) is None
