"""Launched processes that share a GPU: the environment that they find."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import run_gpu
import shared_gpus


@pytest.mark.parametrize(
    ("sharing", "place"), [("4", ["0", "1", "process-3"]), ("2", ["1", "1", "process-3"]), ("1", ["3", "4", None])]
)
def test_every_launched_process_has_a_host_of_its_own(sharing: str, place: list[str | None], tmp_path: Path) -> None:
    site = run_gpu.make_site(tmp_path / "site", wheels=None)
    names = ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "NCCL_HOSTID"]
    tools = str(Path(shared_gpus.__file__).parent)
    launched = {"RANK": "3", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", shared_gpus.VARIABLE: sharing}
    done = subprocess.run(
        [sys.executable, "-c", f"import os; print([os.environ.get(name) for name in {names}])"],
        capture_output=True,
        text=True,
        env={**os.environ, **launched, "PYTHONPATH": os.pathsep.join([str(site), tools])},
    )
    assert done.stdout == f"{place}\n", done.stderr
