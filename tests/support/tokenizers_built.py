"""A tokenizer of each family, trained in a moment on a few lines, with ChatML's special tokens."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<s>", "</s>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
LINES = [
    "user assistant system tool", "What is the sum of two and three? It is five.", "Thank you, and good bye!",
    "def add(a, b):\n    return a + b\n", "0 1 2 3 4 5 6 7 8 9", "### User:\n### Assistant:\n### System:\n",
] * 4  # fmt: skip
# the two ways in which templates tell, or do not tell, what the assistant has written
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )


def _metaspace():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    return tokenizer, trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIALS, *bytes_of], show_progress=False)


def _unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer, trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
    )


def _wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False)


def _digits_apart():
    """As Llama 3 and Qwen do it: a regular expression splits first, and digits stand alone."""
    tokenizer, trainer = _byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer, trainer


FAMILIES = {f.__name__[1:]: f for f in (_byte_level, _digits_apart, _metaspace, _unigram, _wordpiece)}


@cache
def _trained(family):
    tokenizer, trainer = FAMILIES[family]()
    tokenizer.train_from_iterator(LINES, trainer=trainer)
    return tokenizer.to_str()


def built(family, template=CHATML):
    """A tokenizer of the family with this chat template; a turn ends as a text does."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(family)), bos_token="<s>", eos_token="<|im_end|>",
        pad_token="<pad>", unk_token="<unk>", extra_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    made.chat_template = template
    return made
