"""The one exception of this package."""

from __future__ import annotations

from ..problems import Malformed


class RecipeError(Malformed):
    """A recipe that cannot be run. `problems` holds every mistake that was found, one line of the message each."""
