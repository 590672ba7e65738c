"""The documented quick start (section 1.2), with one changed import line, on a tiny model and tiny data."""

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from tiny_encoder import write_encoder, write_task

SCRIPT = Path(__file__).with_name("quickstart_script.py")
EPOCHS, STEPS = 5, 20
LINE = r"^loss: (\d+\.\d{4}) \| lr: (\S+), scale: +1\.0000 \| grad_norm: \d+\.\d{4} \|$"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(folder: Path, train: int, dev: int, *launcher: str) -> str:
    """What the script prints. The model has no dropout."""
    sizes = {"position_size": 512, "dim_model": 64, "num_heads": 4, "dim_head": 16, "dim_ff": 128}
    model = write_encoder(folder / "model", **sizes, dropout_p=0.0, att_dropout_p=0.0)
    data = write_task(folder / "data", train=train, dev=dev)
    done = subprocess.run(
        [sys.executable, *launcher, SCRIPT, model, data],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_loss_falls_and_it_evaluates_every_epoch(tmp_path: Path) -> None:
    # Without dropout, and with every row in every epoch, the mean loss of an epoch is the same number but for what the
    # model has learnt. The document's learning rate is far below what a random model would need to get anything right.
    printed = run(tmp_path, 64 * STEPS, 96)
    steps = re.findall(LINE, printed, re.M)
    assert len(steps) == EPOCHS * STEPS
    losses = [float(loss) for loss, _ in steps]
    means = [sum(losses[epoch * STEPS : (epoch + 1) * STEPS]) / STEPS for epoch in range(EPOCHS)]
    assert all(later < earlier for earlier, later in pairwise(means)), means
    assert means[-1] < 0.98 * means[0]
    # Noam: the rate rises linearly to start_lr / sqrt(warmup_iter) over 100 iterations.
    assert [float(rate) for _, rate in steps[:3]] == [1e-8, 2e-8, 3e-8]
    assert len(re.findall(r"^accuracy: \d+\.\d\d$", printed, re.M)) == EPOCHS


def test_torchrun_divides_its_work_and_one_process_prints(tmp_path: Path) -> None:
    # Three steps of 64 rows for each process, and an odd number of rows to evaluate, of which it gathers all.
    printed = run(tmp_path, 64 * 2 * 3, 33, *TORCHRUN)
    losses = [float(loss) for loss, _ in re.findall(LINE, printed, re.M)]
    assert len(losses) == EPOCHS * 3
    assert sum(losses[-3:]) < sum(losses[:3])
    accuracies = [float(accuracy) for accuracy in re.findall(r"^accuracy: (\d+\.\d\d)$", printed, re.M)]
    assert len(accuracies) == EPOCHS
    assert all(round(accuracy / 100 * 33, 2) in range(34) for accuracy in accuracies)
