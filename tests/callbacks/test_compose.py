"""Techniques are ordered or refused by their cards alone, whatever the order they were given in."""

from contextlib import suppress
from itertools import pairwise, permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.callbacks import compose
from shoestring.callbacks.catalog.compose import INTERACTIONS, Rule
from shoestring.callbacks.catalog.registry import TECHNIQUES, UnknownTechnique, make, names, technique_class
from shoestring.callbacks.contract import PARTS, Card, IncompatibleTechniques, Misconfigured, Technique


def technique(name, reads=(), writes=(), needs=(), refuses=()):
    card = Card(name=name, does="nothing", reads=reads, writes=writes, needs=needs, refuses=refuses)
    return type(name, (Technique,), {"card": card, "__repr__": lambda self: name})()


def order(*techniques, rules=(), facts=()):
    """The names in the order of composition, which every order of the input must give."""
    orders = {tuple(t.card.name for t in compose(given, facts, rules).techniques) for given in permutations(techniques)}
    assert len(orders) == 1
    return list(*orders)


def rule(first, second, verdict, why="because"):
    return Rule(first=(first,), second=(second,), verdict=verdict, why=why, source="a paper", fix="fix it")


def test_who_writes_a_part_acts_before_who_reads_it_and_ties_go_by_name():
    d = technique("d", writes={"weights"})
    assert order(technique("a", reads={"weights"}), d, technique("b")) == ["b", "d", "a"]
    assert order(technique("c"), technique("b"), technique("a")) == ["a", "b", "c"]
    chain = [
        technique("z", writes={"batch"}),
        technique("m", reads={"batch"}, writes={"loss"}),
        technique("a", reads={"loss"}),
    ]
    assert order(*chain) == ["z", "m", "a"]
    # who reads what it writes itself is no reader of the other: these two need a rule
    assert order(technique("b", reads={"lr"}, writes={"lr"}), technique("a", reads={"lr"})) == ["b", "a"]


PART = st.sets(st.sampled_from(sorted(PARTS)), max_size=2)


@given(st.lists(st.tuples(PART, PART), max_size=5), st.randoms())
def test_the_order_never_depends_on_the_input(parts, draw):
    made = [technique(f"t{i}", reads, writes) for i, (reads, writes) in enumerate(parts)]
    shuffled = draw.sample(made, len(made))

    def outcome(given):
        try:
            return [t.card.name for t in compose(given, (), ()).techniques]
        except IncompatibleTechniques as error:
            return str(error).partition("for")[0]  # where a cycle is entered is nobody's concern

    first = outcome(made)
    assert first == outcome(shuffled)
    if isinstance(first, list):
        cards = {t.card.name: t.card for t in made}
        for i, early in enumerate(first):
            for late in first[i + 1 :]:
                assert not (cards[late].writes & (cards[early].reads - cards[early].writes)), (early, late)


def test_two_writers_need_a_rule():
    a, b = technique("large_batch", writes={"batch"}), technique("batch_ramp", writes={"batch", "lr"})
    with pytest.raises(IncompatibleTechniques, match=r"^batch_ramp and large_batch both write 'batch'\. Keep one\.$"):
        order(a, b)
    assert order(a, b, rules=[rule("large_batch", "batch_ramp", "order")]) == ["large_batch", "batch_ramp"]
    assert order(a, b, rules=[rule("batch_ramp", "large_batch", "warn")]) == ["batch_ramp", "large_batch"]
    with pytest.raises(
        IncompatibleTechniques, match=r"large_batch and batch_ramp do not go together: because \(a paper\)\. fix it"
    ):
        order(a, b, rules=[rule("large_batch", "batch_ramp", "refuse")])


def test_rules_warn_explain_and_concern_only_those_who_are_there():
    a, b = technique("a", writes={"lr"}), technique("b", writes={"lr"})
    composition = compose([b, a], (), [rule("a", "b", "warn", "gains shrink"), rule("a", "c", "refuse")])
    assert composition.warnings == ("a with b: gains shrink (a paper). Fix: fix it.",)
    assert composition.reasons == ()
    assert compose([b, a], (), [rule("b", "a", "order", "b first")]).reasons == ("b before a: b first",)


def test_needs_and_refusals_are_facts_of_the_run():
    card = technique("kernels", needs={"cuda", "bf16"}, refuses={"zero-3"})
    with pytest.raises(IncompatibleTechniques, match=r"kernels needs 'cuda', but this run has 'bf16', 'cpu'"):
        compose([card], {"cpu", "bf16"})
    with pytest.raises(IncompatibleTechniques, match=r"needs 'bf16', 'cuda', but this run has nothing special"):
        compose([card])
    with pytest.raises(IncompatibleTechniques, match=r"kernels does not work with 'zero-3'"):
        compose([card], {"cuda", "bf16", "zero-3"})
    assert compose([card], {"cuda", "bf16", "single"}).techniques == (card,)


def test_the_same_technique_twice_is_refused():
    with pytest.raises(IncompatibleTechniques, match="lr_schedule is given twice"):
        compose([make("lr_schedule"), make("lr_schedule", {"shape": "cosine"})])


def test_a_cycle_is_named_step_by_step():
    needs = [("a", "loss", "lr"), ("b", "lr", "batch"), ("c", "batch", "loss")]
    ring = [technique(name, reads={reads}, writes={writes}) for name, reads, writes in needs]
    with pytest.raises(IncompatibleTechniques) as error:
        compose(ring, (), ())
    named = str(error.value).removeprefix("no order works for ").split(":")[0].split(" -> ")
    assert named[0] == named[-1] and set(named) == {"a", "b", "c"}
    after = {"a": "b", "b": "c", "c": "a"}
    assert all(after[early] == late for early, late in pairwise(named)), named


def test_a_bad_setting_is_refused_before_anything_is_spent():
    with pytest.raises(Misconfigured, match=r"gradual_pruning: sparsity=1\.5 is not allowed; use a share in \[0, 1\)"):
        compose([technique_class("gradual_pruning")(sparsity=1.5)])


def test_a_card_names_only_known_parts():
    with pytest.raises(Misconfigured, match=r"card 'x': writes \['wieghts'\] is not among \["):
        Card(name="x", does="", writes={"wieghts"})


def fitting_with(first):
    """As many shipped techniques as go together with this one."""
    chosen = [technique_class(first).example()]
    for name in TECHNIQUES:
        if name != first:
            with suppress(IncompatibleTechniques):
                compose([*chosen, technique_class(name).example()], FACTS)
                chosen.append(technique_class(name).example())
    return chosen


FACTS = {"cpu", "bf16", "single", "adamw"}


@pytest.mark.parametrize("first", TECHNIQUES)
def test_what_goes_together_has_one_order(first):
    chosen = fitting_with(first)
    order = [t.card.name for t in compose(chosen, FACTS).techniques]
    assert order == [t.card.name for t in compose(chosen[::-1], FACTS).techniques]
    for one, other, _ in PAIRS:
        if {one, other} <= set(order):
            assert order.index(one) < order.index(other)


PAIRS = [(one, other, rule) for rule in INTERACTIONS for one, other in product(rule.first, rule.second)]


@pytest.mark.parametrize(("one", "other", "rule"), PAIRS, ids=[f"{one}-{other}" for one, other, _ in PAIRS])
def test_a_rule_is_about_two_techniques_and_acts(one, other, rule):
    assert rule.source and {one, other} <= set(TECHNIQUES), "a rule about nobody"
    pair = [technique_class(name).example() for name in (other, one)]
    if rule.verdict == "refuse":
        with pytest.raises(IncompatibleTechniques, match=f"{one} and {other} do not go together"):
            compose(pair, FACTS)
        return
    composition = compose(pair, FACTS)
    assert [t.card.name for t in composition.techniques] == [one, other]
    assert len(composition.warnings) == (rule.verdict == "warn")


def test_a_pair_has_one_rule():
    pairs = [frozenset((one, other)) for one, other, _ in PAIRS]
    assert len(set(pairs)) == len(pairs)


def test_techniques_are_made_by_name_with_the_nearest_in_mind():
    assert make("gradual_pruning", {"sparsity": 0.9}).settings()["sparsity"] == 0.9
    with pytest.raises(UnknownTechnique, match=r"'gradual_prunning'.*[Dd]id you mean 'gradual_pruning'"):
        make("gradual_prunning")
    with pytest.raises(UnknownTechnique, match=r"has no setting 'sparcity'.*[Dd]id you mean 'sparsity'"):
        make("gradual_pruning", {"sparcity": 0.9})
    assert list(TECHNIQUES) == names()[: len(TECHNIQUES)]
    for name in TECHNIQUES:
        assert technique_class(name).card.name == name
