"""Whatever moment a process is killed at, the newest checkpoint is whole and training goes on from it bit by bit."""

from pathlib import Path

import pytest
from checkpoint_training import kill_savers


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_killed_savers(tmp_path: Path, asynchronous: bool) -> None:
    found = kill_savers(tmp_path / "checkpoints", 15, asynchronous=asynchronous)
    assert found["newest step"] > 10
    assert found["unfinished"] > 0, "no kill came while a checkpoint was being written"
