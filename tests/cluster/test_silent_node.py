"""A node that dies while the nodes reduce among themselves: real processes, and a wait of a dozen seconds."""

from pathlib import Path

import pytest
from preflight_ranks import fly, verdict

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


def test_who_falls_silent_is_named_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    codes, job_dir, said = fly(tmp_path, 3, limits={"timeout": "3 s"}, dies=1)
    assert codes == [86, 9, 86], said
    outcome = verdict(job_dir)
    assert outcome["bad"] == ["n2"] and "has not answered" in outcome["nodes"][1]["faults"][0]
