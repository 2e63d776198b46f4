"""The catalogue of devices: what they can compute, hold, draw and cost, each figure with its source and date.

    >>> hardware("h100-sxm").peak_flops["bf16"]
    989000000000000.0
    >>> match("NVIDIA L40S").name
    'l40s'

The figures live in hardware.yaml beside this file. A user's own file, `$SHOESTRING_HOME/hardware.yaml`, is merged over
it entry by entry and key by key: an own cluster's price is three lines.

    hardware:
      h100-sxm: {usd_per_hour: 1.10}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ... import ShoestringError
from ...directories import home
from ...problems import Malformed
from ...spelling import all_near, nearest
from ...yaml_reader import plain, read_text, read_yaml

CATALOGUE = Path(__file__).with_name("hardware.yaml")
DTYPES = ("bf16", "fp16", "tf32", "fp32", "fp8")
_KEYS = {"aliases", "match", "tflops", "memory_gib", "watts", "usd_per_hour", "spot", "spec", "price", "note"}
_REQUIRED = ("memory_gib", "watts", "usd_per_hour")  # may be null, must be said
_VENDORS = re.compile(r"\b(nvidia|tesla|geforce|amd|instinct|corporation)\b")


class HardwareError(ShoestringError):
    """An unknown device name, or a hardware.yaml that breaks the rules."""


@dataclass(frozen=True)
class Hardware:
    """One device of the catalogue.

    name            as recipes spell it, e.g. "h100-sxm"; "cpu" is one core
    peak_flops      dense FLOP/s by dtype (bf16, fp16, tf32, fp32, fp8); an absent dtype is not accelerated, an empty
                    mapping means that the peak has to be measured (`trainer.machine.measured_peak`)
    memory_bytes    what a program sees; None: ask the machine
    watts           board power limit; for "cpu" an estimate per core
    usd_per_hour    one device on demand; None: no public price is known, the recipe has to give one
    source, date    where the figures come from and the day of the price, ISO format
    spot_usd_per_hour   interruptible, where known
    """

    name: str
    peak_flops: Mapping[str, float]
    memory_bytes: int | None
    watts: float | None
    usd_per_hour: float | None
    source: str
    date: str
    spot_usd_per_hour: float | None = None
    note: str = ""
    aliases: tuple[str, ...] = ()
    patterns: tuple[str, ...] = field(default=(), repr=False)


def known_hardware() -> dict[str, Hardware]:
    """Every device by name, the user's own file merged in. The files are parsed once per change."""
    own = home() / "hardware.yaml"
    stamp = own.stat().st_mtime_ns if own.is_file() else 0
    return dict(_load(own, stamp))


def hardware(name: str) -> Hardware:
    """The device called `name`: a catalogue name, an alias, or a full device name. HardwareError with the nearest."""
    known = known_hardware()
    spelled = name.strip().lower().replace("_", "-").replace(" ", "-")
    for entry in known.values():
        if spelled == entry.name or spelled in entry.aliases:
            return entry
    matched = match(name)
    if matched is not None:
        return matched
    raise HardwareError(_unknown(name, spelled, known))


def match(device_name: str) -> Hardware | None:
    """The device that `torch.cuda.get_device_name()` names, or None. Never a near miss: the whole name must match."""
    bare = _bare(device_name)
    for entry in known_hardware().values():
        if any(re.fullmatch(pattern, bare) for pattern in entry.patterns):
            return entry
    return None


def _bare(device_name: str) -> str:
    """Lower case, vendor words dropped, every run of separators one space: "A100-SXM4-80GB" -> "a100 sxm4 80gb"."""
    return " ".join(re.sub(r"[^a-z0-9.]+", " ", _VENDORS.sub(" ", device_name.lower())).split())


def _unknown(name: str, spelled: str, known: Mapping[str, Hardware]) -> str:
    spellings = {spelling: entry.name for entry in known.values() for spelling in (entry.name, *entry.aliases)}
    near = all_near(spelled, spellings)[:3]
    hint = f"Did you mean {' or '.join(dict.fromkeys(near))}?" if near else f"Known: {', '.join(sorted(known))}."
    return f"unknown hardware {name!r}. {hint} Add your own under `hardware:` in {home() / 'hardware.yaml'}."


@lru_cache(maxsize=8)
def _load(own: Path, stamp: int) -> dict[str, Hardware]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is compiled in
    shipped = yaml.load(CATALOGUE.read_text(encoding="utf-8"), Loader=loader)  # reads the same by our own rules
    entries: dict[str, dict[str, Any]] = shipped["hardware"]
    if stamp:
        for name, change in _user_entries(own).items():
            entries[name] = _merged(entries.get(name), change, own)
    return {name: _entry(name, facts, shipped) for name, facts in entries.items()}


def _user_entries(own: Path) -> dict[str, dict[str, Any]]:
    try:
        tree, problems = read_yaml(read_text(own), lambda line: f"{own}:{line}", what="hardware file")
    except Malformed as error:
        raise HardwareError(f"{own} is not YAML: {error}") from None
    if problems:
        raise HardwareError("\n".join(map(str, problems)))
    content = plain(tree)
    if not isinstance(content, dict) or set(content) - {"hardware"}:
        raise HardwareError(f"{own} must have one top-level key, `hardware:`, with an entry per device below it.")
    entries = content.get("hardware") or {}
    for name, change in entries.items():
        _check(f"{own}: {name}", change)
    return entries


def _check(where: str, change: Any) -> None:
    if not isinstance(change, dict):
        raise HardwareError(f"{where} must be a mapping such as {{usd_per_hour: 1.10}}, found {change!r}.")
    for key in set(change) - _KEYS:
        near = nearest(str(key), _KEYS)
        hint = f"Did you mean {near!r}?" if near else f"Keys: {', '.join(sorted(_KEYS))}."
        raise HardwareError(f"{where} has the unknown key {key!r}. {hint}")
    for key in (*_REQUIRED, "spot"):
        _check_number(f"{where}.{key}", change.get(key))
    for dtype, value in (change.get("tflops") or {}).items():
        if dtype not in DTYPES:
            raise HardwareError(f"{where}.tflops has the unknown dtype {dtype!r}. Known: {', '.join(DTYPES)}.")
        _check_number(f"{where}.tflops.{dtype}", value)


def _check_number(where: str, value: Any) -> None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0):
        return
    raise HardwareError(f"{where} must be a number of at least 0, found {value!r}.")


def _merged(shipped: dict[str, Any] | None, change: dict[str, Any], own: Path) -> dict[str, Any]:
    if shipped is None:
        missing = [key for key in _REQUIRED if key not in change]
        if missing:
            raise HardwareError(f"{own}: a new device needs {', '.join(missing)} (null where not known).")
        shipped = {}
    tflops = {**(shipped.get("tflops") or {}), **(change.get("tflops") or {})}
    return {**shipped, **change, "tflops": tflops, "own": str(own), "own_price": "usd_per_hour" in change}


def _entry(name: str, facts: dict[str, Any], shipped: dict[str, Any]) -> Hardware:
    source, date = _provenance(facts, shipped)
    gib = facts["memory_gib"]
    return Hardware(
        name=name,
        peak_flops={dtype: value * 1e12 for dtype, value in (facts.get("tflops") or {}).items() if value is not None},
        memory_bytes=None if gib is None else int(gib * 2**30),
        watts=facts["watts"],
        usd_per_hour=facts["usd_per_hour"],
        source=source,
        date=date,
        spot_usd_per_hour=facts.get("spot"),
        note=facts.get("note", ""),
        aliases=tuple(facts.get("aliases", ())),
        patterns=tuple(facts.get("match", ())),
    )


def _provenance(facts: dict[str, Any], shipped: dict[str, Any]) -> tuple[str, str]:
    spec = shipped["spec_sources"].get(facts.get("spec"), facts.get("spec") or "the user's file")
    price = shipped["price_sources"].get(facts.get("price"), {"text": facts.get("price") or "the user's file"})
    own = facts.get("own")
    if own and facts["own_price"]:
        price = {"text": own}
    mark = f" (with changes from {own})" if own else ""
    return f"{spec}{mark}; price: {price['text']}", str(price.get("date", ""))
