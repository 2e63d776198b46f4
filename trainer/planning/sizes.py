"""How large a recipe's model is, from its configuration alone: no weights are made, and torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ...recipes import Recipe
from ...recipes.adapters import KINDS
from ..tasks.optimizers.cards import LARGEST_SIDE
from .configurations import configuration_of
from .encoder_decoder import stacks_of

LANGUAGE = ("causal-lm", "masked-lm")
CLASSES = {"python-packages": 10}  # of data that this package brings


@dataclass(frozen=True)
class Size:
    """Counts of a model; None where its configuration does not tell.

    `active` are the parameters a token is multiplied with (input embeddings are looked up, not multiplied), `inside`
    those of them in blocks, which a quantized base keeps in few bytes, and `largest` those of the largest matrix.
    `queries` is how wide the queries of all heads are.
    `sides` are the squares of both sides of all trained matrices in blocks over their elements: 2, if they are square.
    """

    parameters: int | None = None
    trainable: int | None = None
    active: int = 0
    layers: int = 0
    hidden: int = 0
    intermediate: int = 0
    kv_share: float = 1.0
    heads: int = 0
    queries: int = 0
    inside: int = 0
    largest: int = 0
    sides: float = 2.0
    vocabulary: int = 0
    tokens: bool = False  # work is counted in tokens

    def flops_per_token(self, length: int) -> float:
        """Forward and backward: 6 a trained parameter, 4 a frozen one, 12 * layers * queries * length for attention.

        A frozen one has no gradient of its own, but hands on that of its input. Adapters are not among the `active`.
        """
        trained = float(self.trainable or 0)
        adapted = trained < (self.parameters or 0)
        products = 4 * self.active + 6 * trained if adapted else 6 * self.active
        return products + 12 * self.layers * self.queries * length * self.tokens

    @property
    def head_flops_per_token(self) -> float:
        """Of the output layer's forward, which a loss in chunks computes twice."""
        return 2.0 * self.hidden * self.vocabulary


def size_of(recipe: Recipe) -> Size:
    """The size of the recipe's model; an unknown one is all None."""
    config = dict(recipe.model.config or configuration_of(recipe.model.name) or {})
    if recipe.model.task == "image-classification":
        return _perceptron(config) if config.get("kind") == "mlp" else Size()
    if recipe.model.task == "seq2seq":
        return _encoder_decoder(recipe, config)
    layers = _first(config, "num_hidden_layers", "n_layer", "num_layers")
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    if not layers or not hidden:
        return Size(tokens=recipe.model.task in LANGUAGE)
    vocabulary = _first(config, "vocab_size") or _entries(recipe.model.tokenizer) or 32000
    return _transformer(recipe, config, layers, hidden, vocabulary)


def _transformer(recipe: Recipe, config: Mapping[str, Any], layers: int, hidden: int, vocabulary: int) -> Size:
    intermediate = _first(config, "intermediate_size", "n_inner") or 4 * hidden
    heads = _first(config, "num_attention_heads", "n_head") or 1
    share = (_first(config, "num_key_value_heads") or heads) / heads
    queries = heads * (_first(config, "head_dim") or hidden // heads)
    gated = config.get("model_type") not in ("bert", "gpt2", "roberta", "distilbert", "opt", "gpt_neox")
    inside = layers * (hidden * queries * (2 + 2 * share) + (3 if gated else 2) * hidden * intermediate)
    causal = recipe.model.task in LANGUAGE  # a token of the vocabulary is predicted
    tied = bool(config.get("tie_word_embeddings", config.get("model_type") in ("gpt2", "bert")))
    head = hidden * vocabulary if causal else 0
    small = _norms_and_biases(recipe, config, layers, hidden, intermediate)
    parameters = int(inside + small + hidden * vocabulary + (0 if tied or not causal else head))
    trainable, sides = parameters, _sides(_adapted(None, hidden, queries, share, intermediate, gated))
    if (adapter := recipe.model.adapter) is not None:
        targets = None if adapter.targets == "all-linear" else adapter.targets
        adapted = _adapted(targets, hidden, queries, share, intermediate, gated)
        trained = KINDS[adapter.kind].trained
        trainable = layers * sum(trained(adapter.rank, inputs, outputs) for inputs, outputs in adapted)
        parameters += trainable
        sides = _sides([each for i, o in adapted for each in ((i, adapter.rank), (adapter.rank, o))])
    return Size(
        parameters=parameters, trainable=trainable, active=int(inside + head), layers=layers, hidden=hidden,
        intermediate=intermediate, kv_share=share, heads=heads, queries=queries, inside=int(inside),
        largest=hidden * max(intermediate, vocabulary if trainable == parameters else 0),
        vocabulary=vocabulary if causal else 0, tokens=True, sides=sides,
    )  # fmt: skip


def _encoder_decoder(recipe: Recipe, config: Mapping[str, Any]) -> Size:
    """Of a source and a target together: each token passes through one of both stacks."""
    stacks = stacks_of(config)
    if stacks is None:
        return Size(tokens=True)
    vocabulary = _first(config, "vocab_size") or _entries(recipe.model.tokenizer) or 32000
    embeddings = stacks.hidden * vocabulary
    parameters = trainable = stacks.inside + stacks.small + embeddings * (1 if stacks.tied else 2)
    sides = _sides(stacks.named(None))
    if (adapter := recipe.model.adapter) is not None:
        adapted = stacks.named(None if adapter.targets == "all-linear" else adapter.targets)
        trainable = sum(KINDS[adapter.kind].trained(adapter.rank, inputs, outputs) for inputs, outputs in adapted)
        parameters += trainable
        sides = _sides([each for i, o in adapted for each in ((i, adapter.rank), (adapter.rank, o))])
    return Size(
        parameters=parameters, trainable=trainable, active=stacks.inside + embeddings, layers=stacks.layers,
        hidden=stacks.hidden, intermediate=stacks.intermediate, heads=stacks.heads, queries=stacks.queries,
        inside=stacks.inside, vocabulary=vocabulary, tokens=True, sides=sides,
        largest=stacks.hidden * max(stacks.intermediate, vocabulary if trainable == parameters else 0),
    )  # fmt: skip


def _adapted(
    targets: Sequence[str] | None, hidden: int, queries: int, share: float, intermediate: int, gated: bool
) -> list[tuple[int, int]]:
    """Inputs and outputs of the adapted matrices of a block; None: of all."""
    keys = int(queries * share)
    widths = {"q": (hidden, queries), "k": (hidden, keys), "v": (hidden, keys), "o": (queries, hidden)}
    widths |= {"up": (hidden, intermediate), "down": (intermediate, hidden)}
    widths |= {"gate": (hidden, intermediate)} if gated else {}
    if targets is None:
        return list(widths.values())
    names = {"query": "q", "key": "k", "value": "v", "out": "o", "fc1": "up", "fc2": "down", "c_fc": "up"}
    parts = [each.rpartition(".")[2].removesuffix("_proj") for each in targets]
    return [widths.get(names.get(part, part), (hidden, hidden)) for part in parts]


def _sides(matrices: Sequence[tuple[int, int]]) -> float:
    """Sides that SOAP does not turn are left out."""
    squares = sum(side**2 for matrix in matrices for side in matrix if side <= LARGEST_SIDE)
    return squares / max(1, sum(a * b for a, b in matrices))


def _norms_and_biases(recipe: Recipe, config: Mapping[str, Any], layers: int, hidden: int, intermediate: int) -> int:
    """What Llama and BERT have beside their large matrices; a rounding error, and left out, for other families."""
    if config.get("model_type") == "llama":
        return (2 * layers + 1) * hidden
    if config.get("model_type") != "bert" or recipe.model.task != "sequence-classification":
        return 0
    embeddings = (_first(config, "max_position_embeddings") or 512) + (_first(config, "type_vocab_size") or 2)
    norms, biases = (2 * layers + 1) * 2 * hidden, layers * (5 * hidden + intermediate)
    classes = 1 if recipe.model.task == "reward-model" else CLASSES.get(recipe.data.source or "", 2)
    return embeddings * hidden + norms + biases + hidden * (hidden + 1) + classes * (hidden + 1)  # pooler, classifier


def _entries(tokenizer: Any) -> int | None:
    """Of a tokenizer to be trained, or of one that lies beside a model."""
    if isinstance(tokenizer, str):
        return _first(configuration_of(tokenizer) or {}, "vocab_size")
    return getattr(tokenizer, "vocab_size", None)


def _perceptron(config: Mapping[str, Any]) -> Size:
    widths = [64, *config.get("hidden", [128]), 10]  # scikit-learn's digits are 8 x 8, ten classes
    count = sum(a * b + b for a, b in pairwise(widths))
    return Size(parameters=count, trainable=count, active=count)


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((int(config[key]) for key in keys if config.get(key)), None)
