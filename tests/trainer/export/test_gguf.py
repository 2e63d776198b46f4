"""GGUF files, read back by the gguf package and by transformers, weights and words alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chatting
import pytest
import torch
import transformers
from finished import finished
from tokenizers_built import LINES, built

from shoestring.trainer.export import gguf_file
from shoestring.trainer.export.gguf_vocabulary import without_marks
from shoestring.trainer.export.runtimes import eager, relative_error, sample
from shoestring.trainer.export.trained import CannotExport, Trained, open_run
from shoestring.trainer.export.write import export

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore")
QWEN: dict[str, Any] = {**chatting.SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def trained(runs: Path) -> Trained:
    return open_run(chatting.chatting(runs / "chatting"))


def text_of(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


@pytest.mark.parametrize(
    ("quantize", "least", "most"), [(None, 0, 1e-6), ("float16", 1e-5, 2e-3), ("q8_0", 1e-4, 3e-2)]
)
def test_logits_are_those_of_the_model_up_to_the_rounding_that_was_asked_for(
    trained: Trained, quantize: str | None, least: float, most: float, tmp_path: Path
) -> None:
    made = export(trained, "gguf", out=tmp_path / "out", quantize=quantize)
    assert least <= made.error <= most < made.tolerance * 10 and made.error == made.from_original
    reader = gguf.GGUFReader(tmp_path / "out" / gguf_file.NAME)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    matrix = {None: "F32", "float16": "F16", "q8_0": "Q8_0"}[quantize]
    assert kinds["blk.1.ffn_down.weight"] == kinds["token_embd.weight"] == matrix
    assert kinds["blk.0.attn_norm.weight"] == "F32" and "output.weight" not in kinds, "tied to the embeddings"
    assert text_of(reader, "general.architecture") == "llama"
    assert text_of(reader, "llama.attention.head_count_kv") == 2


def test_the_rows_of_queries_and_keys_turn_as_llama_cpp_turns_them(trained: Trained, tmp_path: Path) -> None:
    """Pairs of neighbours there, halves of a head here: by hand for a head of four rows."""
    rows = torch.arange(8.0)[:, None]
    assert gguf_file.interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    export(trained, "gguf", out=tmp_path / "out")
    kept = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(tmp_path / "out" / gguf_file.NAME).tensors}
    mine = dict(trained.model.named_parameters())["model.layers.0.self_attn.k_proj.weight"]
    assert torch.equal(
        kept["blk.0.attn_k.weight"], mine[[h * 16 + half * 8 + i for h in (0, 1) for i in range(8) for half in (0, 1)]]
    )


def test_words_become_the_same_tokens(trained: Trained, tmp_path: Path) -> None:
    export(trained, "gguf", out=tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=gguf_file.NAME)
    for line in [*LINES, "Ünïcode 漢字 \t 12", "<|im_start|>user\nSay one.<|im_end|>"]:
        assert theirs(line)["input_ids"] == trained.task.tokenizer(line)["input_ids"]
    reader = gguf.GGUFReader(tmp_path / "out" / gguf_file.NAME)
    assert text_of(reader, "tokenizer.ggml.pre") == "gpt-2"
    types, ids = text_of(reader, "tokenizer.ggml.token_type"), trained.task.tokenizer.get_vocab()
    assert types[ids["<|im_end|>"]] == gguf.TokenType.CONTROL and types[ids["a"]] == gguf.TokenType.NORMAL
    assert text_of(reader, "tokenizer.ggml.eos_token_id") == ids["<|im_end|>"]
    assert text_of(reader, "tokenizer.chat_template") == trained.task.tokenizer.chat_template


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Mistral", "Llama"])
def test_every_family_that_is_promised_computes_the_same(trained: Trained, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = getattr(transformers, f"{kind}Config")(vocab_size=412, **QWEN, tie_word_embeddings=False, head_dim=16)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # also those that begin as zeros and ones
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.config.use_cache = False  # with a cache, packed chats see each other
    other = trained.with_model(model)
    notes = gguf_file.write(other, tmp_path, None)
    batch = sample(trained)
    assert relative_error(gguf_file.reload(tmp_path)(batch), eager(model)(batch), batch) < 1e-5
    assert bool(notes) == (kind == "Mistral"), "its window"
    assert text_of(gguf.GGUFReader(tmp_path / gguf_file.NAME), "tokenizer.ggml.tokens")[411] == "[PAD411]"


def test_what_is_not_written_is_refused_with_what_is(trained: Trained, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CannotExport, match=r"GPT2LMHeadModel is not written; LlamaForCausalLM, Mistral.*Qwen3ForCausalLM are"
    ):
        export(open_run(finished("gpt2", runs)), "gguf", out=tmp_path / "out")
    shape = {**chatting.SHAPE, "vocab_size": 400}
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    for changes, said in (({"rope_parameters": scaled}, "'linear'"), ({"mlp_bias": True}, "biases")):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **changes))
        with pytest.raises(CannotExport, match=said):
            gguf_file.write(trained.with_model(model), tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    from shoestring.trainer.export.gguf_vocabulary import add_vocabulary

    for family, said in (("metaspace", "BPE is not written"), ("wordpiece", "WordPiece")):
        with pytest.raises(CannotExport, match=said):
            add_vocabulary(None, built(family), 400)


def test_a_template_keeps_its_white_space_without_marks() -> None:
    from jinja2 import Environment

    marked = "{{ m }} {%- generation %}\n{{ m }}{%- endgeneration -%} !"
    assert Environment().from_string(without_marks(marked)).render(m="x") == "x\nx!"
