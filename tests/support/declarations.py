"""All that a plan may ask of techniques. Imports neither torch nor Lightning."""

from __future__ import annotations

from shoestring.callbacks.catalog.registry import TECHNIQUES, declare
from shoestring.callbacks.contract import Workload

WORKLOAD = Workload(parameters=10**9, layers=24, sequence_length=1024, tokens_per_step=2**16, steps=10_000)


def declarations() -> dict[str, list[str]]:
    """By technique: its card, its settings, and what its default and its example need and predict."""
    said = {}
    for name in TECHNIQUES:
        default = declare(name)
        card = {
            key: sorted(value) if isinstance(value, frozenset) else value for key, value in vars(default.card).items()
        }
        said[name] = [repr(card), repr(default.setting_names())]
        for each in (default, type(default).example(), type(default).noop()):
            each.check()
            said[name] += [repr(each), repr(sorted(each.needs())), repr(each.predict(WORKLOAD))]
    return said
