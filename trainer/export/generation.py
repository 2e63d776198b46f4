"""Text from a model on disk: a run, an export of one, an adapter, or any folder that transformers loads.

A run's `final` folder is read as transformers or PEFT would read it, without the run's data; a model that has no such
form (adapters beside a quantized base, techniques that changed its layers) is rebuilt from the run's recipe.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...callbacks.sampling.seeding import seeded
from ..ledger import RunIdentity
from .trained import BEST, WEIGHTS, CannotExport, find_run, manifest_of, open_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]
Messages = Sequence[Mapping[str, str]]  # {role, content} each
EXACT_STARTS = ("zero", "gaussian", "orthogonal")  # of adapters that go with their base as others have it


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. temperature 0: the likeliest token each time; top_p: the share of likelihood to draw from.

    `CannotExport` for a setting outside its range.
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, legal, rule in (
            ("max-tokens", self.max_tokens, self.max_tokens >= 1, "a whole number from 1"),
            ("temperature", self.temperature, self.temperature >= 0, "a number from 0"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("seed", self.seed, self.seed >= 0, "a whole number from 0"),
        ):
            if not legal:
                raise CannotExport(f"--{name} {value}: {rule} is needed.")


class TextModel:
    """A language model with its tokenizer, to continue texts or to answer in chats; of sources, to write their targets.

    Args:
        model: In evaluation mode.
        tokenizer: The model's own.
        name: What the user called it, for errors.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name

    @property
    def chats(self) -> bool:
        """Whether it has a template for chats."""
        return bool(self.tokenizer.chat_template)

    @property
    def reads_sources(self) -> bool:
        """Whether it reads a source with an encoder, and writes a target from its beginning."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def window(self) -> int | None:
        """The most tokens that it can read; None where its settings do not tell."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def complete(self, text: str, sampling: Sampling, say: Say) -> str:
        """What follows `text`, or is its target; `say` hears every piece of it as soon as it is there."""
        return self._generate(self._opened(text), sampling, say)

    def answer(self, messages: Messages, sampling: Sampling, say: Say) -> tuple[str, int]:
        """The assistant's next message, and how many of the oldest exchanges were left out because of the window."""
        self.require_chats()
        system = [each for each in messages[:1] if each["role"] == "system"]
        rest = list(messages[len(system) :])
        dropped = 0
        ids = self._rendered([*system, *rest])
        while self.window and len(ids) + min(sampling.max_tokens, self.window // 4) > self.window and len(rest) > 2:
            del rest[:2]  # a question and its answer
            dropped += 1
            ids = self._rendered([*system, *rest])
        return self._generate(ids, sampling, say), dropped

    def require_chats(self) -> None:
        """Raise `CannotExport` where it has no template for chats."""
        if not self.chats:
            raise CannotExport(
                f"{self.name} has no chat template: it was not trained on chats. "
                "`shoestring generate` continues a text with it."
            )

    def _opened(self, text: str) -> list[int]:
        """The tokens of a text, opened as the tokenizer opens texts and not closed; of a source, closed, too."""
        ids = list(self.tokenizer(text)["input_ids"]) if text or self.reads_sources else []
        if self.reads_sources:
            return ids
        if ids and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id) and len(ids) > 1:
            del ids[-1]
        start = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        return ids or [start]

    def _rendered(self, messages: Messages) -> list[int]:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                [dict(each) for each in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise CannotExport(f"the chat template of {self.name} refuses this chat: {error}") from error
        return list(self.tokenizer(str(text), add_special_tokens=False)["input_ids"])

    def _generate(self, ids: list[int], sampling: Sampling, say: Say) -> str:
        before = 0 if self.reads_sources else len(ids)  # of what is generated from
        room = sampling.max_tokens if not self.window else min(sampling.max_tokens, self.window - before)
        if room < 1 or (self.window and len(ids) > self.window):
            raise CannotExport(f"the text has {len(ids)} tokens, and {self.name} reads at most {self.window}.")
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        rows = torch.tensor([ids], device=self.model.device)
        with seeded(sampling.seed), torch.no_grad():
            out = self.model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=room, use_cache=True,
                streamer=_streamer(self.tokenizer, say), eos_token_id=self._ends(),
                pad_token_id=self.tokenizer.pad_token_id or 0, **drawn,
            )  # fmt: skip
        return str(self.tokenizer.decode(out[0, before:], skip_special_tokens=True))

    def _ends(self) -> list[int] | None:
        """The tokens that end a text: the tokenizer's, and those of the model's own settings."""
        settings = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(settings if isinstance(settings, list) else [settings])} - {None}
        return sorted(ends) or None


def _streamer(tokenizer: PreTrainedTokenizerBase, say: Say) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]


# -- opening -----------------------------------------------------------------------------------------------------------
def open_text_model(wanted: str, *, best: bool = False, allow_code: bool = False) -> TextModel:
    """The model that `wanted` names: a run (directory, id, name), an exported folder, or a Hugging Face one.

    best: the weights of a run's best evaluation. `CannotExport` where there is none, or it cannot generate text.
    """
    path = Path(wanted).expanduser()
    if path.exists() and not (path / "run.json").exists():
        if best:
            raise CannotExport(f"--best: {wanted} is not a run directory: it has no run.json.")
        return _moved(_of_folder(path, wanted), wanted)
    return _moved(_of_run(find_run(path if path.exists() else wanted), wanted, best, allow_code), wanted)


def _moved(pair: tuple[Any, PreTrainedTokenizerBase], name: str) -> TextModel:
    model, tokenizer = pair
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TextModel(model.to(device).eval(), tokenizer, name)


def _of_run(run_dir: Path, wanted: str, best: bool, allow_code: bool) -> tuple[Any, PreTrainedTokenizerBase]:
    folder = run_dir / (BEST if best else WEIGHTS)
    recipe = RunIdentity.load(run_dir).recipe
    if folder.exists() and _stands_alone(folder, recipe.get("model") or {}):
        return _of_folder(folder, wanted)
    trained = open_run(run_dir, best=best, allow_code=allow_code)
    model: Any = trained.model
    if _writer(type(model).__name__) is None:
        raise _cannot(wanted, type(model).__name__)
    return model, trained.task.tokenizer


def _stands_alone(folder: Path, model: Mapping[str, Any]) -> bool:
    """Whether others load the folder and get what was trained."""
    if (folder / "config.json").exists():
        return True
    adapter = model.get("adapter") or {}
    whole = model.get("name") and model.get("dtype") not in ("nf4", "int8")
    return bool((folder / "adapter_config.json").exists() and whole and adapter.get("start", "zero") in EXACT_STARTS)


def _of_folder(path: Path, wanted: str) -> tuple[Any, PreTrainedTokenizerBase]:
    if (path / "adapter_config.json").exists():
        return _adapted(path, wanted)
    if not (path / "config.json").exists():
        form = manifest_of(path).get("to")
        what = f"is an export to {form}" if form else "is no run, no adapter and no Hugging Face folder (config.json)"
        raise CannotExport(f"{wanted} {what}; text is generated from runs and from exports to hf and peft.")
    architectures = json.loads((path / "config.json").read_text()).get("architectures") or [
        "model of no named architecture"
    ]
    task = _writer(architectures[0])
    if task is None:
        raise _cannot(wanted, architectures[0])
    from .hf import load

    return load(path, task), _tokenizer(path, wanted)


def _adapted(path: Path, wanted: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """The adapters of a folder, merged into the base that they name."""
    import peft

    from ..tasks.lora import merge_adapter
    from ..tasks.models import resolve_name
    from .hf import load

    settings = json.loads((path / "adapter_config.json").read_text())
    task = {None: "causal-lm", "CAUSAL_LM": "causal-lm", "SEQ_2_SEQ_LM": "seq2seq"}.get(settings.get("task_type"))
    if task is None:
        raise _cannot(wanted, f"adapter for {settings['task_type']}")
    base = settings.get("base_model_name_or_path")
    if not base:
        raise CannotExport(f"{wanted} is an adapter that names no base model. Give the run that has trained it.")
    try:
        model = load(Path(resolve_name(base)), task)
    except OSError as error:
        raise CannotExport(f"{wanted}: cannot load its base {base!r}: {str(error).splitlines()[0]}") from error
    with warnings.catch_warnings():
        # PEFT 0.21 reads a name that transformers 5 has renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        model = peft.PeftModel.from_pretrained(model, str(path), autocast_adapter_dtype=False)
    own = path if (path / "tokenizer_config.json").exists() else Path(base)
    return merge_adapter(model), _tokenizer(own, wanted)


def _tokenizer(folder: Path, wanted: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise CannotExport(f"{wanted} has no tokenizer: {str(error).splitlines()[0]}") from error


def _writer(architecture: str) -> str | None:
    """The task of models that write text and are of this class; None: it does not."""
    from transformers.models.auto import modeling_auto as auto

    for task, known in (
        ("causal-lm", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("seq2seq", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ):
        if any(architecture in ([names] if isinstance(names, str) else names) for names in known.values()):
            return task
    return None


def _cannot(wanted: str, architecture: str) -> CannotExport:
    return CannotExport(
        f"{wanted} is a {architecture}, which cannot generate text; language models (task causal-lm or seq2seq) can."
    )
