"""The types of a recipe's fields: numbers and texts in their ranges, and amounts with their units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from ..own_code import CODE
from ..units import UnitError
from . import amounts

SLUG = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"  # also a folder's name, so no slashes and no leading dot

Code = Annotated[str, Field(pattern=CODE)]
Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, lt=2**63)]


def _said(error: UnitError) -> PydanticCustomError:
    return PydanticCustomError("amount", "{allowed}", {"allowed": error.allowed, "hint": error.hint})


def duration(zero: bool, word: str | None = None) -> BeforeValidator:
    def check(value: object) -> object:
        try:
            return value if value is None or value == word else amounts.duration(value, zero)
        except UnitError as error:
            raise _said(UnitError(f"{word}, or {error.allowed}", error.hint) if word else error) from None

    return BeforeValidator(check)


def amount(base: str, scale: int = 1, whole: bool = False) -> BeforeValidator:
    def check(value: object) -> object:
        try:
            return None if value is None else amounts.amount(value, base, scale, whole)
        except UnitError as error:
            raise _said(error) from None

    return BeforeValidator(check, json_schema_input_type=float | str | None)


def refused(reasons: Mapping[str, str], *allowed: str) -> BeforeValidator:
    """Of values that are known and cannot be had, say why."""

    def check(value: object) -> object:
        if isinstance(value, str) and value in reasons:
            raise _said(UnitError(" | ".join(allowed), f"not {value}: {reasons[value]}"))
        return value

    return BeforeValidator(check)


def judged() -> BeforeValidator:
    def check(value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return " ".join(amounts.judged_by(value))
        except UnitError as error:
            raise _said(error) from None

    return BeforeValidator(check)
