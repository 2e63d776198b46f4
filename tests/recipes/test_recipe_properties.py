"""Recipes, whatever is in them: equal content has an equal hash, dumping loses nothing, typing errors are found."""

from decimal import Decimal

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from shoestring.recipes import BudgetSpec, RecipeError, dump_recipe, load_recipe, recipe_from, shipped_recipes
from shoestring.recipes.amounts import duration
from shoestring.recipes.fields import section_of
from shoestring.recipes.recipe import Recipe
from shoestring.units import UnitError

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(st.integers(1, 10**7), st.integers(1, 10**7))
@few
def test_spellings_of_one_amount_are_one_budget(hundredths, number):
    minutes = Decimal(hundredths) / 100
    spellings = [
        f"{minutes} min",
        f"{minutes * 60} s",
        f"{minutes * 60}s",
        float(minutes) / 60 if hundredths % 100 == 0 else 0,
    ]
    hours = {BudgetSpec(hours=spelling).hours for spelling in spellings if spelling}
    assert len(hours) == 1
    assert BudgetSpec(kwh=f"{number} Wh") == BudgetSpec(kwh=f"{Decimal(number) / 1000} kWh")
    assert BudgetSpec(tokens=number, usd=f"${number}") == BudgetSpec(tokens=f"{number} tokens", usd=float(number))
    assert duration(f"{minutes} min") == duration(f"{minutes * 60} seconds")
    assert duration(duration(f"{minutes} min")) == duration(f"{minutes} min")
    with pytest.raises(UnitError):
        duration(f"-{minutes} min")


@given(st.data())
@few
def test_the_hash_is_of_the_content_not_of_its_spelling(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("hash")
    flat = load_recipe(data.draw(st.sampled_from(sorted(shipped_recipes()))))
    values = {key: value for key, value in flat.model_dump(mode="json").items() if key != "name"}
    base, child = {}, {"extends": "base.yaml"}
    for section in data.draw(st.permutations(sorted(values))):
        if not isinstance(values[section], dict) or section == "goal":
            (base if data.draw(st.booleans()) else child)[section] = values[section]
            continue
        for key in data.draw(st.permutations(sorted(values[section]))):
            (base if data.draw(st.booleans()) else child).setdefault(section, {})[key] = values[section][key]
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    (folder / "child.yaml").write_text(yaml.safe_dump(child, sort_keys=False))
    loaded = load_recipe(folder / "child.yaml")
    assert loaded.hash == flat.hash and loaded.name == "child"
    assert load_recipe(folder / "child.yaml", [f"seed={flat.seed + 1}"]).hash != flat.hash


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=20)
    | st.sampled_from(["1e-4", "off", "null", "~", "0x1f", ".nan", "1e999", "- a", "{", "# b", "9" * 50, "a: b", "!x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True)
RECIPES = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries({"task": st.just("causal-lm"), "name": st.text(min_size=1, max_size=20)}),
        "data": st.fixed_dictionaries({"source": st.just("a/b"), "args": st.dictionaries(NAMES, PLAIN, max_size=3)}),
        "budget": st.dictionaries(
            st.sampled_from(["usd", "hours", "device_hours", "flops", "kwh"]), st.floats(1e-9, 1e9), min_size=1
        ),
        "techniques": st.lists(
            NAMES | st.tuples(NAMES, st.dictionaries(NAMES, PLAIN, max_size=3)).map(lambda pair: {pair[0]: pair[1]}),
            max_size=3,
            unique_by=lambda item: item if isinstance(item, str) else next(iter(item)),
        ),
    },
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "optimizer": st.fixed_dictionaries(
            {}, optional={"lr": st.floats(1e-12, 1e3), "eps": st.floats(1e-300, 1), "warmup": st.just("1.5e3 tokens")}
        ),
        "evaluation": st.fixed_dictionaries({"generate": st.text(min_size=1)}),
    },
)


@given(RECIPES, st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True))
@few
def test_dump_and_load_is_identity(tmp_path_factory, values, name):
    assume("trust_remote_code" not in values["data"]["args"])
    recipe = recipe_from({**values, "name": name})
    path = tmp_path_factory.mktemp("dump") / "r.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe and again.hash == recipe.hash and dump_recipe(again) == dump_recipe(recipe)


def typed_keys(values, section=Recipe, path=()):
    """The paths of all keys that the schema knows (settings, config and args are free)."""
    for key in values:
        yield (*path, key)
        inner = section_of(section.model_fields[key].annotation)
        if isinstance(values[key], dict) and inner is not None:
            yield from typed_keys(values[key], inner, (*path, key))


@st.composite
def typos(draw, word):
    """`word` with one letter dropped, added, replaced or swapped with its neighbour."""
    at, letter = draw(st.integers(0, len(word) - 1)), draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
    return draw(
        st.sampled_from(
            [word[:at] + word[at + 1 :], word[:at] + letter + word[at:], word[:at] + letter + word[at + 1 :], swapped]
        )
    )


@given(st.data())
@settings(few, max_examples=150)
def test_a_misspelled_key_is_one_error_that_names_the_key(data):
    values = load_recipe(data.draw(st.sampled_from(sorted(shipped_recipes())))).model_dump(mode="json")
    path = data.draw(st.sampled_from(list(typed_keys(values))))
    held = values
    for part in path[:-1]:
        held = held[part]
    typo = data.draw(typos(path[-1]))
    assume(typo and typo not in held)
    held[typo] = held.pop(path[-1])
    with pytest.raises(RecipeError) as caught:
        recipe_from(values)
    (only,) = caught.value.problems
    assert only.key == ".".join([*path[:-1], typo]) and only.hint == f"did you mean {path[-1]}?"


CHUNKS = st.text(max_size=3) | st.sampled_from(
    [
        "\n",
        "  ",
        ": ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "!!x ",
        '"',
        "'",
        "#",
        "|",
        "? ",
        "1e9",
        "null",
        "\t",
        "---\n",
        "%",
    ]
)


@given(st.data())
@settings(few, max_examples=100)
def test_any_text_is_a_recipe_or_one_kind_of_error(tmp_path_factory, data):
    text = data.draw(st.sampled_from(list(shipped_recipes().values()))).read_text()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        text = text[:start] + data.draw(CHUNKS) + text[start + data.draw(st.integers(0, 9)) :]
    path = tmp_path_factory.mktemp("any") / "r.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        load_recipe(path, [data.draw(CHUNKS), f"seed={data.draw(CHUNKS)}"])
    except RecipeError as error:
        assert error.problems and all(line.isprintable() for line in str(error).split("\n"))
