"""The tokenizer of a task: the model's own, one by name, or a byte-level BPE trained on the task's training texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import build_once, digest
from .carried import resolve_name
from .corpora import in_batches
from .errors import TaskError
from .paths import model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .corpora import Corpus

EOS, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
SMALLEST = 256 + 2  # every byte, and the two specials
CHARACTERS_PER_TOKEN = 1000  # to train on: every merge is then seen often; more text changes little and costs time


def load_tokenizer(model: Any, corpus: Corpus, *, cache: Path, own: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that the recipe's model section names, with an end-of-text and a padding token.

    corpus: the training texts, read only for `{train: bpe, vocab_size: N}`. own: the one that the run has kept, which
    its weights are trained for and which is taken instead.
    """
    if own is not None:
        return _named(str(own))
    wanted = model.tokenizer or model.name
    if wanted is None:
        raise TaskError(
            "model.tokenizer: a model built from config has no tokenizer of its own. "
            "Set {train: bpe, vocab_size: 4096}, or a name or path."
        )
    if not isinstance(wanted, str):
        return train_bpe(corpus, vocab_size=_setting(wanted, "vocab_size"), cache=cache)
    return _named(wanted)


def train_bpe(corpus: Corpus, *, vocab_size: int, cache: Path) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on a corpus (cached by its content): nothing is unknown to it, decoding is lossless.

    Source: byte-level BPE as in GPT-2. It reads whole texts, taken evenly, up to 1000 characters per token.
    """
    if vocab_size < SMALLEST:
        raise TaskError(f"model.tokenizer.vocab_size {vocab_size} is below {SMALLEST}: 256 bytes and 2 special tokens.")
    folder = cache / "tokenizers" / digest(["bpe", str(vocab_size), str(CHARACTERS_PER_TOKEN), corpus.fingerprint])
    return _named(str(build_once(folder, lambda private: _train(corpus.texts, vocab_size, private))))


KEPT = "tokenizer"  # in a run's folder


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> None:
    """Keep it with the run, unless it would come back as another one."""
    folder, fresh = run_dir / KEPT, run_dir / f".{KEPT}.writing"
    shutil.rmtree(fresh, ignore_errors=True)
    tokenizer.save_pretrained(fresh)
    try:
        faithful = tokenizer_key(_named(str(fresh))) == tokenizer_key(tokenizer)
    except TaskError:
        faithful = False
    shutil.rmtree(folder, ignore_errors=True)
    if faithful:
        fresh.rename(folder)
    else:
        shutil.rmtree(fresh)


def kept_tokenizer(run_dir: Path) -> Path | None:
    """Where a run that has trained keeps its tokenizer; None where it has none, or has not trained yet."""
    trained = any((run_dir / "checkpoints").glob("[0-9]*")) or (run_dir / "final").exists()
    return run_dir / KEPT if trained and (run_dir / KEPT).is_dir() else None


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for two tokenizers exactly when they give equal tokens: part of the key of tokenized data."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([type(tokenizer).__name__, json.dumps(tokenizer.get_vocab(), sort_keys=True)])
    rules = json.loads(backend.to_str())
    # what the last call left there, not a property of the tokenizer
    rules.pop("truncation", None)
    rules.pop("padding", None)
    return digest([json.dumps(rules, sort_keys=True)])


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token numbers of texts, nothing added and nothing cut. A text that spells a special token is text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    backend.no_truncation()
    backend.no_padding()
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        # twice as fast as the tokenizer's own call: it keeps no character offsets
        return [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


# of a text's tokens: (number, where its characters begin, where they end)
Offsets = list[tuple[int, int, int]]


def exact_offsets(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[Offsets]]:
    """Give the tokens of texts and the characters that each stands for; special tokens are read as such.

    White space belongs to its token: a tokenizer's own offsets may leave it out. Raises `TaskError` for a tokenizer
    without a backend in Rust, which cannot tell characters.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TaskError(f"the tokenizer {tokenizer.name_or_path!r} cannot tell which characters a token stands for.")
    from tokenizers import Tokenizer

    rules = json.loads(backend.to_str())
    rules.update(truncation=None, padding=None, post_processor=None)  # the last one adds tokens and trims offsets
    copy = Tokenizer.from_str(json.dumps(rules))

    def encode(texts: list[str]) -> list[Offsets]:
        encoded = copy.encode_batch(texts, add_special_tokens=False)
        return [[(n, *span) for n, span in zip(each.ids, each.offsets, strict=True)] for each in encoded]

    return encode


class EncodeCut:
    """Token numbers of texts with what the model expects around them, at most `length`; counts the texts it has `cut`.

    A text that spells a special token is text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.cut = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        out = self.tokenizer(texts, truncation=True, max_length=self.length, split_special_tokens=True)
        if out.encodings is not None:
            self.cut += sum(bool(encoding.overflowing) for encoding in out.encodings)
        return out["input_ids"]


def framing(tokenizer: PreTrainedTokenizerBase, *, packed: bool) -> tuple[list[int], list[int]]:
    """The tokens that open and close a document.

    With a beginning-of-text token: it opens, end-of-text closes. Without one, packed documents are opened by
    end-of-text (it then closes the one before), padded ones are closed by it.
    """
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if end is None:
        raise TaskError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token, so documents cannot end.")
    if start is not None and start != end:
        return [start], [end]
    return ([end], []) if packed else ([], [end])


def enclosing(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens around a document that is read in both directions: [CLS] and [SEP], or what `framing` has."""
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    return framing(tokenizer, packed=False) if start is None or end is None else ([start], [end])


def with_mask(tokenizer: PreTrainedTokenizerBase, model: Any) -> PreTrainedTokenizerBase:
    """The tokenizer with a mask token: its own, or a new one where the recipe's model section has one trained."""
    if tokenizer.mask_token is None and (isinstance(model.tokenizer or model.name, str)):
        raise TaskError(
            f"model.tokenizer: {model.tokenizer or model.name!r} has no mask token, and masked-lm hides tokens under "
            "one. Use the tokenizer of a masked model, such as BERT, or {train: bpe, vocab_size: 4096}."
        )
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK})
    return tokenizer


def with_end(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer closing each text with its end-of-text token: its own way, or made to, which is saved with it."""
    end, backend = tokenizer.eos_token_id, getattr(tokenizer, "backend_tokenizer", None)
    if end is not None and end in tokenizer("a")["input_ids"]:
        return tokenizer
    if end is None or backend is None:
        raise TaskError(f"the tokenizer {tokenizer.name_or_path!r} does not close texts, so targets would not end.")
    from tokenizers.processors import TemplateProcessing

    closed = f"$A {tokenizer.eos_token}"
    backend.post_processor = TemplateProcessing(single=closed, special_tokens=[(tokenizer.eos_token, end)])
    return tokenizer


def _setting(settings: Any, name: str) -> Any:
    return settings[name] if isinstance(settings, dict) else getattr(settings, name)


def _named(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = model_folder(resolve_name(name), "model.tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise TaskError(f"model.tokenizer: cannot load {name!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise TaskError(f"model.tokenizer: {name!r} has no padding and no end-of-text token, so rows cannot be padded.")
    return tokenizer


def _train(texts: Sequence[str], vocab_size: int, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_sample(texts, CHARACTERS_PER_TOKEN * vocab_size), trainer=trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD).save_pretrained(folder)


def _mean_length(texts: Sequence[str]) -> int:
    """Characters of a text, from the first thousand, or from as many as make ten million characters."""
    count = characters = 0
    for batch in in_batches(texts):
        for text in batch:
            count, characters = count + 1, characters + len(text)
            if count == 1000 or characters > 10_000_000:
                return max(1, characters // count)
    return max(1, characters // max(1, count))


def _sample(texts: Sequence[str], characters: int) -> Iterator[str]:
    """Texts up to a number of characters, spread over the corpus by a fixed stride."""
    mean = _mean_length(texts)
    stride, left = max(1, mean * len(texts) // characters), characters
    for i in range(0, len(texts), stride):
        if left <= 0:
            return
        text = texts[i] or ""
        yield text[:left]
        left -= len(text)
