"""Train straight on, and again with SIGKILL halfway, through `model-center pretrain` in several processes.

    python tools/benchmarks/checkpoints/resume_runs.py --steps 200 --processes 2
    python tools/benchmarks/checkpoints/resume_runs.py --model.precision=bf16 --engine.deterministic=true --processes 1

Both runs have dropout and write checkpoints while they train. Losses, weights, optimizer and random generators must be
equal bit by bit. They train on the GPUs where there are some, one a process, which needs engine.deterministic, as in
the second form. Options that are not named here go to `model-center pretrain`. Shorter ones are tests:
integration_tests/test_pretrain_resume.py and test_pretrain_gpu.py.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "packages" / "model-center" / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "integration_tests"))

from pretraining_runs import assert_same_run, run, run_whole, write_inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each run; half of them are done before the kill")
    parser.add_argument("--processes", type=int, default=2, help="processes that train together")
    given, for_pretrain = parser.parse_known_args()
    options = [f"--max_steps={given.steps}", "--resume=auto", *for_pretrain]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        run_whole(folder, "straight", *options, processes=given.processes)
        killed = given.steps // 2 + 5
        run(folder, "killed", *options, processes=given.processes, stop=killed, number=signal.SIGKILL)
        text = run_whole(folder, "killed", *options, processes=given.processes).text
        assert_same_run(folder, "straight", "killed", given.steps)
    lines = text.splitlines()
    print(next(line for line in lines if " steps of " in line))
    print(next(line for line in lines if line.startswith("resumed after step")).partition(" from ")[0])
    print(f"{given.steps} steps in {given.processes} processes, killed before step {killed + 1}: equal bit by bit")


if __name__ == "__main__":
    main()
