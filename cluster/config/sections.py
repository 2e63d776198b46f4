"""What a cluster file may say. Frozen, no unknown keys, no silent conversions; each field's description is its rule."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ...section import Section as Section
from ...units import BYTES, TIME, quantity
from .hardware import HardwareError, hardware

NAME = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"  # fits a DNS label with something added on both sides
VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"


def _hours(value: Any) -> Any:
    """Hours from `"90 min"`, `"4 h"`, `"2 days"` or a bare number of hours."""
    if isinstance(value, str):
        number, base = quantity(value, TIME)
        if not base:
            raise ValueError("no unit")
        return float(number / 3600)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _bytes(value: Any) -> Any:
    """Bytes from `"20 GB"`, `"512 MiB"` or a bare number of bytes."""
    if isinstance(value, str):
        return int(quantity(value, BYTES)[0])
    return value


DURATION = 'a duration like "90 min", "4 h" or "2 days", or a number of hours, above 0'
Hours = Annotated[float, BeforeValidator(_hours), Field(gt=0)]
Bytes = Annotated[int, BeforeValidator(_bytes), Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Dollars = Annotated[float, Field(ge=0, strict=False)]
Text = Annotated[str, Field(min_length=1)]
Line = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]  # may stand in a script's header


class PriceSpec(Section):
    """The price of one device for an hour: on demand, interruptible, or on machines one owns."""

    kind: Literal["on-demand", "spot", "own"] = "on-demand"
    usd_per_device_hour: Dollars | None = Field(None, description="null (the catalogue's price), or a number from 0")


class LimitsSpec(Section):
    """Limits that no job on this cluster may exceed. `hours` and `usd` are totals of a job over all its attempts."""

    nodes: Count | None = Field(None, description="null, or a whole number from 1")
    hours: Hours | None = Field(None, description=DURATION)
    attempt_hours: Hours | None = Field(None, description=DURATION + ": what the engine gives at a time")
    usd: Annotated[float, Field(gt=0, strict=False)] | None = Field(None, description="null, or dollars above 0")
    requeues: int = Field(20, ge=0, le=10_000, description="a whole number from 0")


class ContainerSpec(Section):
    """An image to run in, and what runs it where the engine leaves the choice (Slurm: Pyxis or Apptainer)."""

    image: Line = Field(description="an image, like ghcr.io/team/train:1 or /shared/train.sif")
    runtime: Literal["auto", "pyxis", "apptainer"] = "auto"


class EnvironmentSpec(Section):
    """The environment of a process, in the order it is set up: modules, venv, variables, secrets."""

    modules: Annotated[tuple[Line, ...], Field(strict=False)] = Field((), description="a list of module names")
    venv: Line | None = Field(None, description="null, or the folder of a virtual environment")
    python: Line | None = Field(None, description="null, or an interpreter that has shoestring")
    container: ContainerSpec | None = Field(None, description="null, or a mapping like {image: …}")
    variables: dict[Annotated[str, Field(pattern=VARIABLE)], str] = Field(
        default={}, description="a mapping of variable names to text"
    )


class SecretSpec(Section):
    """The source of a secret when a job is submitted: an environment variable, or the first line of a file."""

    env: Annotated[str, Field(pattern=VARIABLE)] | None = Field(None, description="the name of a variable")
    file: Text | None = Field(None, description="a file")

    @model_validator(mode="after")
    def _one(self) -> SecretSpec:
        if (self.env is None) == (self.file is None):
            raise ValueError("exactly one of env and file")
        return self


class PreflightSpec(Section):
    """Checks that a node must pass before any training. A ratio compares with the median of the nodes of this job."""

    enabled: bool = Field(True, description="true | false")
    timeout: Hours = Field(120 / 3600, description=DURATION)
    disk: Bytes = Field(2**30, description='free bytes where the run is stored, like "20 GB"')
    memory: Bytes = Field(2**29, description='available bytes, like "16 GiB"')
    clock_skew: Hours = Field(5 / 3600, description=DURATION)
    matmul: Annotated[float, Field(ge=0, lt=1, strict=False)] = Field(
        0.5, description="the least share of the median speed, from 0 (no check) to below 1"
    )
    allreduce: Annotated[float, Field(ge=0, lt=1, strict=False)] = Field(
        0.25, description="the least share of the median bandwidth, from 0 (no check) to below 1"
    )


class InterconnectSpec(Section):
    """The connection between nodes: the network interface, and variables the site's fabric wants (`NCCL_IB_HCA`, …)."""

    interface: Line | None = Field(None, description="null, or a network interface like eth0 or ib0")
    variables: dict[Annotated[str, Field(pattern=VARIABLE)], str] = Field(
        default={}, description="a mapping of variable names to text"
    )


def known(name: Any) -> Any:
    """The catalogue's own name of a device."""
    try:
        return hardware(name).name if isinstance(name, str) else name
    except HardwareError as error:
        raise ValueError(str(error)) from None


class Cluster(Section):
    """The place where jobs run: one cluster file. Make one with `load_cluster`."""

    name: Annotated[str, Field(pattern=NAME)] = Field(description="lower-case letters, digits and dashes, at most 40")
    engine: Line = Field(description="the name of an engine")
    nodes: Count = Field(1, description="a whole number from 1: nodes of a job that does not say")
    devices_per_node: Count = Field(description="a whole number from 1: devices (without GPUs: processes) per node")
    hardware: Annotated[str, BeforeValidator(known)] = Field(description="a name of the hardware catalogue, like cpu")
    interconnect: InterconnectSpec = InterconnectSpec.model_construct()
    price: PriceSpec = PriceSpec.model_construct()
    limits: LimitsSpec = LimitsSpec.model_construct()
    environment: EnvironmentSpec = EnvironmentSpec.model_construct()
    secrets: dict[Annotated[str, Field(pattern=VARIABLE)], SecretSpec] = Field(
        default={}, description="a mapping like {WANDB_API_KEY: {env: WANDB_API_KEY}}"
    )
    workdir: Line | None = Field(None, description="null (where launch is called), or a folder that all nodes see")
    preflight: PreflightSpec = PreflightSpec.model_construct()
    options: Any = Field(None, description="a mapping of the engine's own settings")

    @property
    def usd_per_device_hour(self) -> float | None:
        """The file's price, else the catalogue's; own machines cost nothing unless the file says so; None: unknown."""
        if self.price.usd_per_device_hour is not None:
            return self.price.usd_per_device_hour
        if self.price.kind == "own":
            return 0.0
        device = hardware(self.hardware)
        return device.spot_usd_per_hour if self.price.kind == "spot" else device.usd_per_hour
