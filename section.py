"""What all sections of the files that users write share, recipes and cluster files alike."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Settings by name: frozen, no unknown keys, no conversions (`"3"` is not 3), no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)
