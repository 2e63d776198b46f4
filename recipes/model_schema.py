"""The model section of a recipe; see `schema`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..section import Section
from .adapters import KINDS, REFUSED
from .field_types import Code, Count, Positive, Share, Text, refused
from .preference_schema import PreferenceSpec as PreferenceSpec


class TokenizerSpec(Section):
    """A tokenizer trained on the run's own data: byte-level BPE, which can spell any text."""

    train: Literal["bpe"] = "bpe"
    vocab_size: int = Field(4096, ge=258, lt=2**24, description="a whole number from 258: 256 bytes, 2 specials")


class AdapterSpec(Section):
    """Small updates of frozen weights that are trained in their place, and can be merged into them (`adapters.KINDS`).

    LoRA, the first of them, adds products of two matrices of `rank`, scaled by `alpha / rank`.
    """

    kind: Annotated[
        Literal[
            "lora", "dora", "loha", "lokr", "gralora", "miss", "hra", "ia3", "hira", "vera", "randlora", "oft", "shira"
        ],
        refused(REFUSED, *KINDS),
    ] = "lora"  # fmt: skip
    rank: Count = Field(8, description="a whole number from 1")
    alpha: Positive = Field(16.0, description="a number above 0")
    dropout: Share = Field(0.0, description="a number from 0 to below 1")
    targets: Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1, strict=False)] = Field(
        "all-linear", description="all-linear, or a list of module names like [q_proj, v_proj]"
    )
    # computing them in float32 costs more activation memory than full fine-tuning in bf16, hence not the default
    dtype: Literal["compute", "float32"] = Field(
        "compute", description="compute | float32: what adapters compute in; their weights are float32 in any case"
    )
    rslora: bool = Field(False, description="true | false: scaled by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    start: Literal["zero", "gaussian", "orthogonal", "olora", "pissa", "loftq"] = Field(
        "zero",
        description="zero | gaussian | orthogonal | olora | pissa | loftq: what LoRA begins with; olora (arXiv "
        "2406.01775) and pissa (arXiv 2404.02948) take it out of the base, loftq (arXiv 2310.08659) makes it of what "
        "nf4 or int8 lose of a pretrained one; that base is then saved with the adapters",
    )


class ModelSpec(Section):
    """The model to train: a task, and a model to start from (`name`) or a shape to start from scratch (`config`)."""

    task: (
        Literal[
            "causal-lm",
            "masked-lm",
            "seq2seq",
            "sequence-classification",
            "token-classification",
            "image-classification",
            "preference",
            "reward-model",
        ]
        | Code
    ) = Field(
        description="causal-lm | masked-lm | seq2seq | sequence-classification | token-classification | "
        "image-classification | preference | reward-model | your own module:attr"
    )
    name: Text | None = Field(None, description="a hub id, a local path or minilm; null for a model from config")
    config: dict[str, Any] | None = Field(None, description="a mapping, like {model_type: llama, hidden_size: 128}")
    tokenizer: Text | TokenizerSpec | None = Field(
        None, description="null (the model's own), a name or path, or {train: bpe, vocab_size: 4096}"
    )
    dtype: Literal["auto", "fp32", "bf16", "nf4", "int8"] = Field(
        "auto",
        description="auto | fp32 | bf16 | nf4 | int8: what weights are kept in; nf4 and int8 for the frozen base of an "
        "adapter. auto is bf16 for such a base where the run computes in bf16, else fp32",
    )
    problem: Literal["single-label", "multi-label", "regression"] = Field(
        "single-label",
        description="single-label | multi-label | regression: whether sequence-classification predicts one class of a "
        "row, any number of classes, or a number",
    )
    class_weights: Literal["balanced"] | Annotated[tuple[Positive, ...], Field(min_length=2, strict=False)] | None = (
        Field(
            None,
            description="null, balanced (a class with half as many samples weighs twice as much), or a list with a "
            "number above 0 for each class, in the order of their names: the factors of their losses, scaled to a mean "
            "of 1 over the training samples",
        )
    )
    adapter: AdapterSpec | None = Field(None, description="null or a mapping like {kind: lora, rank: 8}")
    preference: PreferenceSpec | None = Field(
        None, description="null (dpo, where the task is preference), or a mapping like {loss: dpo, beta: 0.1}"
    )
    attention: Literal["auto", "sdpa", "flash", "flex", "eager"] = Field(
        "auto", description="auto | sdpa | flash | flex | eager: who computes the attention of a language model"
    )
    chunked_loss: bool | Literal["auto"] = Field(
        "auto",
        description="auto | true | false: logits of all positions never exist at once; auto where they are large",
    )
    args: dict[str, Any] = Field(default={}, description="a mapping of keyword arguments")

    @property
    def preferences(self) -> PreferenceSpec:
        """The section `preference`, or what holds where it is left out."""
        return self.preference or PreferenceSpec.model_construct()

    @property
    def form(self) -> str:
        """The task that a model is made for: preferences are learnt by language models, rewards by classifiers."""
        return {"preference": "causal-lm", "reward-model": "sequence-classification"}.get(self.task, self.task)
