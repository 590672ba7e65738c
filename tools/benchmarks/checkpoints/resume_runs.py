"""Train straight on, and again with SIGKILL halfway, through `model-center pretrain` in several processes.

    python tools/benchmarks/checkpoints/resume_runs.py --steps 200 --processes 2

Both runs have dropout and write checkpoints while they train. Losses, weights, optimizer and random generators must be
equal bit by bit. A shorter one is a test: integration_tests/test_pretrain_resume.py.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "packages" / "model-center" / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "integration_tests"))

from test_pretrain_resume import assert_same_run, run, run_whole, write_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each run; half of them are done before the kill")
    parser.add_argument("--processes", type=int, default=2, help="processes that train together")
    given = parser.parse_args()
    options = [f"--max_steps={given.steps}", "--resume=auto"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        run_whole(folder, "straight", *options, processes=given.processes)
        killed = given.steps // 2 + 5
        run(folder, "killed", *options, processes=given.processes, stop=killed, number=signal.SIGKILL)
        text = run_whole(folder, "killed", *options, processes=given.processes).text
        assert_same_run(folder, "straight", "killed", given.steps)
    print(next(line for line in text.splitlines() if line.startswith("resumed after step")).partition(" from ")[0])
    print(f"{given.steps} steps in {given.processes} processes, killed before step {killed + 1}: equal bit by bit")


if __name__ == "__main__":
    main()
