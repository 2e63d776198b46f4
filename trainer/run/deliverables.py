"""What a recipe asks of its finished run besides its weights."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...recipes import Recipe
    from ..tasks.build import Task

NEW_TOKENS = 64  # of a completed prompt


@dataclass
class Deliverables:
    """What a recipe asks of its finished run: a completed prompt, an exported model."""

    recipe: Recipe
    run_dir: Path
    task: Task
    sample: str | None = None
    exported: Path | None = None

    @property
    def wanted(self) -> bool:
        return bool(self.recipe.evaluation.generate or self.recipe.export)

    def seconds(self, step: float) -> float:
        """About how long `make` takes, by the seconds of a step: a model is built, and asked once for each token."""
        rows = 3 * self.recipe.data.batch_size  # a backward pass takes two forward passes
        return self.task.model_seconds + len(self._prompts) * NEW_TOKENS * step / rows

    @property
    def _prompts(self) -> tuple[str, ...]:
        given = self.recipe.evaluation.generate or ()
        return (given,) if isinstance(given, str) else given

    def make(self) -> None:
        from ..export.trained import rebuilt

        recipe, trained = self.recipe, rebuilt(self.recipe, self.run_dir, task=self.task).task
        if self._prompts:
            self.sample = self._completed(trained)
        if recipe.export:
            from ..export.hf import save

            self.exported = Path(recipe.export.path or self.run_dir / "model")
            save(getattr(trained.module, "model", None), trained.tokenizer, self.exported)

    def _completed(self, trained: Task) -> str:
        """What follows the prompt, or each of several after it. A run that has learnt chats is asked it."""
        from ..tasks.generate import complete

        module: Any = trained.module
        chat = asked_as_chats(self.recipe, trained)
        settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "temperature": 0.7, "seed": self.recipe.seed}
        texts = [complete(module, trained.tokenizer, prompt, chat=chat, **settings) for prompt in self._prompts]
        if len(texts) == 1:
            return texts[0]
        return "\n\n".join(f"{prompt}\n{text}" for prompt, text in zip(self._prompts, texts, strict=True))

    def write_card(self) -> None:
        """The card of the exported model, once the run's totals are known."""
        from ..export.model_card import write_card

        if self.exported is not None:
            write_card(self.exported, self.run_dir, self.recipe, self.task.receipt(), "hf")


def asked_as_chats(recipe: Recipe, task: Task) -> bool:
    """Whether a prompt is a user's message to this model, as it has learnt chats, and not the begin of a text."""
    return "trained_tokens" in task.facts and recipe.data.format != "prompt-completion"


def describe(task: Task, folder: Path) -> None:
    """Put settings and tokenizer beside a run's weights, where transformers or PEFT can load these as they are."""
    model: Any = getattr(task.module, "model", None)
    if "transformers" not in sys.modules:  # which has made a model that it knows
        return
    from transformers import PreTrainedModel

    if any(folder.glob("adapter_model*.safetensors")):
        settings = copy.copy(model.peft_config["default"])
        settings.inference_mode = True
        settings.save_pretrained(str(folder))
    elif isinstance(model, PreTrainedModel) and _is_plain(model, folder):
        settings = copy.copy(model.config)
        settings.architectures = [type(model).__name__]  # which a model made from a config does not say of itself
        settings.save_pretrained(folder)
    else:
        return
    if task.tokenizer is not None:
        task.tokenizer.save_pretrained(folder)


def _is_plain(model: Any, folder: Path) -> bool:
    """Whether the files have every weight that the model's settings ask for: techniques may have changed the layers."""
    import torch
    from safetensors import safe_open

    shapes: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    return all(shapes.get(name) == list(p.shape) for name, p in fresh.named_parameters())
