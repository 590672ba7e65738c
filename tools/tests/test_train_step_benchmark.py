"""The benchmark of training steps, at a size for CPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.train_step.workloads import settings_of

TOOLS = Path(__file__).resolve().parents[1]
BATCH, LENGTH, WORDS, WIDTH, INNER, FEED_FORWARD, LAYERS = 4, 16, 200, 32, 32, 64, 2
SIZE = {"num_layers": LAYERS, "dim_model": WIDTH, "num_heads": 2, "dim_head": INNER // 2, "dim_ff": FEED_FORWARD}


def test_ours_and_a_peer_take_turns(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--options", json.dumps({**SIZE, "vocab_size": WORDS}), "--batch", str(BATCH), "--length", str(LENGTH)]
    settings = ["ours-recomputed", "transformers"]
    command = [sys.executable, "-m", "benchmarks.train_step", "--workload", "gpt2-xl"]
    done = subprocess.run(
        [*command, "--settings", *settings, *options, "--turns", "2", "--steps", "2", "--json", str(report)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(TOOLS), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(report.read_text())
    assert [row["name"] for row in results["rows"]] == settings
    assert all(row["samples_per_second"] > 0 and row["name"] in done.stdout for row in results["rows"])
    # Products of a token with all matrices of a block, scores and weighted values of a row, and the head of all
    # positions but each row's last; forward and twice that backward.
    block = 2 * LENGTH * (4 * WIDTH * INNER + 2 * WIDTH * FEED_FORWARD) + 2 * 2 * LENGTH * LENGTH * INNER
    head = 2 * (LENGTH - 1) * WIDTH * WORDS
    for turns in results["turns"].values():
        assert [turn["flops"] for turn in turns] == [3 * BATCH * (LAYERS * block + head)] * 2
        assert turns[0]["tokens"] == BATCH * LENGTH
    losses = [turns[-1]["loss"] for turns in results["turns"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_budgets_that_no_setting_takes() -> None:
    assert list(settings_of(["ours", "ours-compiled-lean"], [0.9, 0.5])) == [
        "ours",
        "ours-compiled-lean 0.9",
        "ours-compiled-lean 0.5",
    ]
    with pytest.raises(ValueError, match=r"--activation_budget needs a setting that has one.*not \['ours'\]"):
        settings_of(["ours"], [0.9])
