"""What other packages import at their top and a run does not need: seconds of every rank's start."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any


@contextmanager
def lightened_imports() -> Iterator[None]:
    """Import Lightning and transformers inside: they get only the few names that they need of large packages.

    torchmetrics' own first lines load every metric there is, and scipy's signal processing; transformers wants one
    function of scipy for models that find objects. And nobody looks for garbage among modules: looking through them
    takes a sixth of the time. They stay, so later collections need not look at them either.
    """
    if "pytorch_lightning" in sys.modules or "transformers" in sys.modules:
        yield
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        _lighten_packages()
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()


def _lighten_packages() -> None:
    metrics = {"__version__": "__about__", "Metric": "metric", "MetricCollection": "collections"}
    # utilities first: it and `metric` import each other; and it asks its own package for the logger
    _lighten("torchmetrics", metrics, first="utilities", _logger=logging.getLogger("torchmetrics"))
    _lighten("scipy.optimize", {"linear_sum_assignment": "_lsap"})


def _lighten(name: str, homes: Mapping[str, str], first: str = "", **given: Any) -> None:
    """Put the package `name` in place with these names of its modules only.

    Its own first lines run as soon as anybody asks it for another name; nothing else tells the difference.
    """
    spec = find_spec(name)
    if name in sys.modules or spec is None or spec.loader is None:
        return
    loader, package = spec.loader, module_from_spec(spec)

    def rest(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        vars(package).pop("__getattr__", None)
        loader.exec_module(package)
        return getattr(package, attribute)

    sys.modules[name] = package
    vars(package).update(given)
    if first:
        import_module(f"{name}.{first}")
    for own, home in homes.items():
        setattr(package, own, getattr(import_module(f"{name}.{home}"), own))
    vars(package)["__getattr__"] = rest
    above, _, own = name.rpartition(".")
    if above:
        setattr(sys.modules[above], own, package)


def import_deepspeeds_muon() -> None:
    """Before DeepSpeed does, in the first backward of ZeRO-1 and ZeRO-2, whatever the optimizer is.

    Its file asks for compiled kernels at its top, and torch loads its compiler to promise them. Not for a run whose
    optimizer is that Muon: the functions stay as they are written, and are slower.
    """
    if "deepspeed.runtime.zero.muon.original_muon" in sys.modules:
        return
    from deepspeed.runtime import compiler

    compiled, compiler.compile = compiler.compile, lambda *args, **options: lambda function: function
    try:
        import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiled
