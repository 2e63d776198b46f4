"""The section of preference tuning in a recipe; see `schema`, and `preference_rules` for what goes together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from ..section import Section
from .field_types import Positive


@dataclass(frozen=True)
class PreferenceLoss:
    """What a loss over preferences takes.

    Attributes:
        source: The paper.
        beta: Of its paper, where a recipe names none.
        keys: Those of `model.preference` that have an effect, beside `loss` and `beta`.
        reference: It measures against the model that training began with.
        pairs: It takes answers in pairs; else one by one, each with whether it is wanted.
    """

    source: str
    beta: float
    keys: tuple[str, ...] = ()
    reference: bool = True
    pairs: bool = True


LOSSES = {
    "dpo": PreferenceLoss("2305.18290", 0.1, ("label_smoothing",)),
    "ipo": PreferenceLoss("2310.12036", 0.1),
    "orpo": PreferenceLoss("2403.07691", 0.1, reference=False),
    "simpo": PreferenceLoss("2405.14734", 2.0, ("label_smoothing", "margin"), reference=False),
    "kto": PreferenceLoss("2402.01306", 0.1, ("desirable_weight", "undesirable_weight"), pairs=False),
}


class PreferenceSpec(Section):
    """The loss of the task `preference`: chosen answers become likelier than rejected ones.

    `dpo`, `ipo` and `kto` measure against a reference, which is the model that training begins with: with an adapter
    the base without it, else log-probabilities that are computed once, before the first step.
    """

    loss: Literal["dpo", "ipo", "orpo", "simpo", "kto"] = Field(
        "dpo",
        description="dpo (arXiv 2305.18290) | ipo (2310.12036) | orpo (2403.07691) | simpo (2405.14734) | kto "
        "(2402.01306); kto takes single answers, too, each with a label",
    )
    beta: Positive | None = Field(
        None,
        description="null (2 for simpo, else 0.1), or a number above 0: of dpo, simpo and kto how steep the loss "
        "is, of ipo how near the reference it stays, of orpo the weight of the odds ratio",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="a number from 0 to below 0.5: the share of pairs that are the wrong way round; dpo and simpo"
    )
    margin: Annotated[float, Field(ge=0)] = Field(
        1.0, description="a number from 0: by how much simpo wants chosen answers to be ahead"
    )
    desirable_weight: Positive = Field(1.0, description="a number above 0: of kto's wanted answers")
    undesirable_weight: Positive = Field(1.0, description="a number above 0: of kto's unwanted answers")

    @property
    def kind(self) -> PreferenceLoss:
        """What the loss takes."""
        return LOSSES[self.loss]

    @property
    def strength(self) -> float:
        """`beta`, or the loss's own."""
        return self.kind.beta if self.beta is None else self.beta
