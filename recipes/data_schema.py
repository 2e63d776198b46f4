"""The sections of `data` that say where rows come from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..section import Section
from .field_types import Count, Positive, Text

Format = Literal[
    "auto", "text", "json", "csv", "parquet", "arrow", "hub", "builtin",
    "plain", "messages", "sharegpt", "alpaca", "prompt-completion", "question-answer",
    "preference", "unpaired-preference",
]  # fmt: skip
COLUMN = "null, or the name that the files give this column"


class ColumnsSpec(Section):
    """The names that your files give to columns, where they are not ours: `{question: ask, answer: reply}`."""

    text: Text | None = Field(None, description=COLUMN)
    label: Text | None = Field(None, description=COLUMN)
    messages: Text | None = Field(None, description=COLUMN)
    conversations: Text | None = Field(None, description=COLUMN)
    prompt: Text | None = Field(None, description=COLUMN)
    completion: Text | None = Field(None, description=COLUMN)
    instruction: Text | None = Field(None, description=COLUMN)
    input: Text | None = Field(None, description=COLUMN)
    output: Text | None = Field(None, description=COLUMN)
    question: Text | None = Field(None, description=COLUMN)
    answer: Text | None = Field(None, description=COLUMN)
    system: Text | None = Field(None, description=COLUMN)
    history: Text | None = Field(None, description=COLUMN)
    chosen: Text | None = Field(None, description=COLUMN)
    rejected: Text | None = Field(None, description=COLUMN)
    tools: Text | None = Field(None, description=COLUMN)


class SourceSpec(Section):
    """One of several sources, and how often samples are drawn from it. What is left out is as in `data`."""

    source: Text = Field(description="a path or glob | a hub name | python-stdlib | python-packages")
    weight: Positive = Field(1.0, description="a number above 0: its share, of the sum of all weights")
    format: Format | None = Field(None, description="null, or as data.format")
    split: Text | None = Field(None, description="null, or the name of a split")
    text_column: Text | None = Field(None, description="null, or the name of a column")
    label_column: Text | None = Field(None, description="null, or the name of a column")
    columns: ColumnsSpec | None = Field(None, description="null, or as data.columns")
    limit: Count | None = Field(None, description="null, or a whole number of rows or files from 1")
    args: dict[str, Any] | None = Field(None, description="null, or a mapping of keyword arguments")

    def settings(self, columns: ColumnsSpec) -> dict[str, Any]:
        """What it sets of `data`, in which it then stands alone. columns: those of `data`, where it has none."""
        given = self.model_dump(exclude={"weight", "columns"}, exclude_none=True)
        return {**given, "sources": (), "columns": self.columns or columns}
