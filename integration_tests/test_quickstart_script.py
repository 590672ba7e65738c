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


def test_its_loss_falls_and_it_evaluates_every_epoch(tmp_path: Path) -> None:
    # Without dropout, and with every row in every epoch, the mean loss of an epoch is the same number but for what the
    # model has learnt. The document's learning rate is far below what a random model would need to get anything right.
    sizes = {"position_size": 512, "dim_model": 64, "num_heads": 4, "dim_head": 16, "dim_ff": 128}
    model = write_encoder(tmp_path / "model", **sizes, dropout_p=0.0, att_dropout_p=0.0)
    data = write_task(tmp_path / "data", train=64 * STEPS, dev=96)
    done = subprocess.run(
        [sys.executable, SCRIPT, model, data],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    steps = re.findall(
        r"^loss: (\d+\.\d{4}) \| lr: (\S+), scale: +1\.0000 \| grad_norm: \d+\.\d{4} \|$", done.stdout, re.M
    )
    assert len(steps) == EPOCHS * STEPS
    losses = [float(loss) for loss, _ in steps]
    means = [sum(losses[epoch * STEPS : (epoch + 1) * STEPS]) / STEPS for epoch in range(EPOCHS)]
    assert all(later < earlier for earlier, later in pairwise(means)), means
    assert means[-1] < 0.98 * means[0]
    # Noam: the rate rises linearly to start_lr / sqrt(warmup_iter) over 100 iterations.
    assert [float(rate) for _, rate in steps[:3]] == [1e-8, 2e-8, 3e-8]
    assert len(re.findall(r"^accuracy: \d+\.\d\d$", done.stdout, re.M)) == EPOCHS
