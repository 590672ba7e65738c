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
# Products of a token with all matrices of a block, scores and weighted values of a row, and the head of all positions
# but each row's last. Backward takes twice that.
BLOCK = 2 * LENGTH * (4 * WIDTH * INNER + 2 * WIDTH * FEED_FORWARD) + 2 * 2 * LENGTH * LENGTH * INNER
FORWARD = BATCH * (LAYERS * BLOCK + 2 * (LENGTH - 1) * WIDTH * WORDS)


def benchmark(*options: str) -> subprocess.CompletedProcess[str]:
    size = json.dumps({**SIZE, "vocab_size": WORDS})
    sizes = ["--workload", "gpt2-xl", "--options", size, "--batch", str(BATCH), "--length", str(LENGTH)]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *sizes, *options],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(TOOLS), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def test_ours_and_a_peer_take_turns(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    settings = ["ours-recomputed", "transformers"]
    done = benchmark("--settings", *settings, "--turns", "2", "--steps", "2", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(report.read_text())
    assert [row["name"] for row in results["rows"]] == settings
    assert all(row["samples_per_second"] > 0 and row["name"] in done.stdout for row in results["rows"])
    for turns in results["turns"].values():
        assert [turn["flops"] for turn in turns] == [3 * FORWARD] * 2
        assert turns[0]["tokens"] == BATCH * LENGTH
    losses = [turns[-1]["loss"] for turns in results["turns"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_loss_curves_begin_with_the_same_weights(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = benchmark("--loss_curve", "10", "--settings", "ours", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    losses = json.loads(report.read_text())["losses"]
    assert set(losses) == {"ours-fp32", "ours"}
    assert losses["ours"] == pytest.approx(losses["ours-fp32"], rel=1e-3)
    assert losses["ours"] != losses["ours-fp32"]


def test_floor_counts_operations_and_bytes(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = benchmark("--floor", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    floor = json.loads(report.read_text())["floor"]
    assert floor["product_tflop"] == pytest.approx(3 * FORWARD / 1e12)
    weights = WIDTH * (WORDS + 1024) + LAYERS * (4 * WIDTH * INNER + 2 * WIDTH * FEED_FORWARD)
    assert weights < floor["update_gb"] * 1e9 / 28 < 1.1 * weights  # biases and norms
    seconds = floor["product_tflop"] / floor["product_rate"] + floor["update_gb"] / floor["copy_rate"]
    assert floor["samples_per_second"] == pytest.approx(BATCH / seconds)
    assert min(floor["product_rate"], floor["copy_rate"]) > 0


def test_budgets_that_no_setting_takes() -> None:
    assert list(settings_of(["ours", "ours-compiled-lean"], [0.9, 0.5])) == [
        "ours",
        "ours-compiled-lean 0.9",
        "ours-compiled-lean 0.5",
    ]
    with pytest.raises(ValueError, match=r"--activation_budget needs a setting that has one.*not \['ours'\]"):
        settings_of(["ours"], [0.9])
