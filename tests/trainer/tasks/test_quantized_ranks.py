"""Adapters beside a base in bf16, 8 and 4 bits, on one rank and on two: crashed, resumed, and the same to the bit."""

from __future__ import annotations

import json

import kept_base_ranks
import pytest
from processes import succeed


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2), ("fsdp2", 2)])
def test_adapters_beside_a_base_in_few_bits_resume_exactly(strategy, world, tmp_path):
    succeed(kept_base_ranks.main, strategy, world, tmp_path, world=world, folder=tmp_path)
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(world)]
    for kind in kept_base_ranks.KINDS[strategy]:
        assert "error" not in seen[0][kind], seen[0][kind]["error"]
        whole, resumed = seen[0][kind]["whole"], seen[0][kind]["resumed"]
        assert whole["final"] == resumed["final"], kind
        assert whole["losses"][-len(resumed["losses"]) :] == resumed["losses"], kind
        assert len(resumed["losses"]) < len(whole["losses"]), "it has resumed, and not begun anew"
        assert whole["masters"] == ["torch.float32"], kind
