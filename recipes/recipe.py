"""A recipe: all its sections together, with where each value comes from and a hash of the content."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PrivateAttr

from ..problems import Problem
from .field_types import SLUG
from .schema import (
    TECHNIQUE,
    BudgetSpec,
    CheckpointSpec,
    ClusterSpec,
    DataSpec,
    EvaluationSpec,
    ExportSpec,
    Goal,
    ModelSpec,
    OptimizerSpec,
    Section,
    StrategySpec,
    TechniqueAsWritten,
    TechniqueSpec,
    TrackingSpec,
    technique_item,
)


class Recipe(Section):
    """A whole run as data: validated, frozen, with a content hash. Make one with `load_recipe`.

    Attributes:
        name: What the run is called; not part of the content.
        seed: Of everything random.
        model: What is trained.
        data: Where samples come from, and how they are cut into batches.
        goal: The quality that the run is for; reached first, it ends the run early.
        budget: What the run may spend.
        techniques: By name, with their settings.
        optimizer: With its learning rate's schedule.
        precision: auto | fp32 | bf16 | fp16.
        deterministic: The same bits again on a GPU, too, which costs speed; a CPU gives them anyway.
        strategy: How model and states are spread over devices.
        cluster: What a device is and costs.
        tracking: Where the run is recorded.
        checkpoint: How often it is saved.
        evaluation: When and how it is evaluated.
        export: What is left behind besides the run's own files.

    Example:
        >>> from shoestring.recipes import load_recipe
        >>> recipe = load_recipe("quickstart")
        >>> recipe.data.batch_size, len(recipe.hash)
        (32, 16)
    """

    name: str = Field(pattern=SLUG, description="letters, digits, dots, dashes and underscores, at most 100")
    seed: int = Field(0, ge=0, lt=2**32, description="a whole number from 0 to 4294967295")
    model: ModelSpec
    data: DataSpec
    goal: Goal | None = Field(None, description="null, or a mapping like {metric: val_loss, below: 3.2}")
    budget: BudgetSpec
    techniques: Annotated[
        tuple[
            Annotated[TechniqueSpec, BeforeValidator(technique_item, json_schema_input_type=TechniqueAsWritten)], ...
        ],
        Field(strict=False),
    ] = Field((), description=f"a list, each item {TECHNIQUE}")
    optimizer: OptimizerSpec = OptimizerSpec.model_construct()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    deterministic: bool = Field(False, description="true | false: the same bits on a GPU, too, at the price of speed")
    strategy: StrategySpec = StrategySpec.model_construct()
    cluster: ClusterSpec = ClusterSpec.model_construct()
    tracking: TrackingSpec = TrackingSpec.model_construct()
    checkpoint: CheckpointSpec = CheckpointSpec.model_construct()
    evaluation: EvaluationSpec = EvaluationSpec.model_construct()
    export: ExportSpec | None = Field(None, description="null, or a mapping like {to: hf}")

    _places: dict[str, str] = PrivateAttr(default_factory=dict)  # key path -> file:line; not part of the content

    def where(self, key: str) -> str:
        """The `file:line` (or override) that set `key`, or else what stands nearest above it.

        `key` is a dotted path, for techniques `techniques.<name>` and `techniques.<name>.<setting>`.
        """
        while key and key not in self._places:
            key = key.rpartition(".")[0]
        return self._places.get(key, f"recipe {self.name}")

    def problem(self, key: str, found: object, allowed: str, hint: str = "") -> Problem:
        """A problem that only shows once the recipe meets the rest (an unknown technique, a missing column).

        `key` is as of `where`, which tells the place. Wrap one or many: `raise RecipeError([recipe.problem(…)])`.
        """
        return Problem(self.where(key), key, found if isinstance(found, str) else repr(found), allowed, hint)

    @property
    def hash(self) -> str:
        """16 hex digits that name the content: equal for equal runs, however spelled; the name is not part of it."""
        content = self.model_dump(exclude={"name"})
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return int(self.hash, 16)
