"""What cannot be built says why, and what to do instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoestring.trainer.data.errors import TaskError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, r"model_type.*'lama' is unknown\. Did you mean 'llama'"),
        ({"model_type": "vit"}, r"model_type for task causal-lm: 'vit'"),
        ({"hiden_size": 8}, r"of llama: 'hiden_size' is unknown\. Did you mean 'hidden_size'"),
        ({"hidden_size": "big"}, r"of llama: .*hidden_size.*expected int"),
        ({"num_attention_heads": 5}, r"of llama: .*5"),
        ({"vocab_size": 100}, r"100 embeddings and the tokenizer 384 tokens"),
        ({"max_position_embeddings": 32}, r"sequence_length 64 is above .* 32"),
    ],
)
def test_a_config_that_cannot_be_built(tiny: Any, changes: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        tiny.task(model={"config": {**tiny.llama, **changes}})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "./absent", "config": None}, r"model\.name: '\./absent' is no folder here"),
        ({"tokenizer": "./absent"}, r"model\.tokenizer: '\./absent' is no folder here"),
        ({"adapter": {"targets": ["q_porj"]}}, r"'q_porj' is unknown\. Did you mean 'q_proj'"),
    ],
)
def test_a_model_that_cannot_be_had(tiny: Any, model: dict, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        tiny.task(model=model)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"source": "./absent/*.txt"}, r"matches no file"),
        ({"text_column": "txt"}, r"'txt' is unknown\. Did you mean 'text'"),
        ({"format": "json"}, r"rows\.csv, line 1 is not JSON"),
        ({"limit": 1}, r"leaves one side empty"),
        ({"sequence_length": 128}, r"not one sample"),
        ({"sequence_length": 1}, r"so 2"),
        ({"source": "python-stdlib", "args": {"pack_isolaton": False}}, r"'pack_isolaton' is unknown"),
    ],
)
def test_data_that_cannot_be_read(tiny: Any, tmp_path: Path, data: dict, message: str) -> None:
    (tmp_path / "rows.csv").write_text("text,n\nab,1\ncd,2\n")
    with pytest.raises(TaskError, match=message):
        tiny.task(data={"source": str(tmp_path / "rows.csv"), **data})
