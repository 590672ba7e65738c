"""Writers killed at random moments, and files damaged in many ways.

The scripts run here with small numbers; their own documentation tells how to run them with large ones.
"""

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "tools" / "benchmarks" / "indexed"


def run(script: str, *options: str) -> dict[str, int]:
    done = subprocess.run([sys.executable, SCRIPTS / script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line[:6].strip().isdigit()]
    return {what: int(count) for count, what in lines}


def test_killed_writers_leave_the_old_or_the_new_data_set() -> None:
    seen = run("kill_writers.py", "--kills", "100")
    assert seen["our reader: whole"] == 100
    assert seen["new data set"] > 0  # the kills hit before, in and after the publication
    assert seen["former data set"] > 0
    assert seen["temporary files left"] > 0


def test_damaged_files_are_refused_or_found_by_verification() -> None:
    seen = run("fuzz_files.py", "--mutations", "1500")
    assert seen["refused"] > 500
    assert seen["read, but verification found the damage"] > 50
    assert seen["without manifest: read"] > 50
