"""The benchmark of training steps, at a size for CPUs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.train_step import floors
from benchmarks.train_step.__main__ import Benchmark, parser
from benchmarks.train_step.workloads import settings_of

from model_center.engine import TorchEngine, use_engine

BATCH, LENGTH, WORDS, WIDTH, INNER, FEED_FORWARD, LAYERS = 4, 16, 200, 32, 32, 64, 2
SIZE = {"num_layers": LAYERS, "dim_model": WIDTH, "num_heads": 2, "dim_head": INNER // 2, "dim_ff": FEED_FORWARD}
# Products of a token with all matrices of a block, scores and weighted values of a row, and the head of all positions
# but each row's last. Backward takes twice that.
BLOCK = 2 * LENGTH * (4 * WIDTH * INNER + 2 * WIDTH * FEED_FORWARD) + 2 * 2 * LENGTH * LENGTH * INNER
FORWARD = BATCH * (LAYERS * BLOCK + 2 * (LENGTH - 1) * WIDTH * WORDS)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the benchmark, whose workers are processes of their own, and returns its report."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*options: str) -> dict[str, Any]:
        size = json.dumps({**SIZE, "vocab_size": WORDS})
        sizes = ["--workload", "gpt2-xl", "--options", size, "--batch", str(BATCH), "--length", str(LENGTH)]
        report = tmp_path / "report.json"
        assert Benchmark(parser().parse_args([*sizes, *options, "--json", str(report)])).run() == 0
        results: dict[str, Any] = json.loads(report.read_text())
        return results

    return run


def test_ours_and_a_peer_take_turns(
    benchmark: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["ours-recomputed", "transformers"]
    results = benchmark("--settings", *settings, "--turns", "2", "--steps", "2")
    printed = capsys.readouterr().out
    assert [row["name"] for row in results["rows"]] == settings
    assert all(row["samples_per_second"] > 0 and row["name"] in printed for row in results["rows"])
    for turns in results["turns"].values():
        assert [turn["flops"] for turn in turns] == [3 * FORWARD] * 2
        assert turns[0]["tokens"] == BATCH * LENGTH
    losses = [turns[-1]["loss"] for turns in results["turns"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_loss_curves_begin_with_the_same_weights(benchmark: Callable[..., dict[str, Any]]) -> None:
    losses = benchmark("--loss_curve", "10", "--settings", "ours")["losses"]
    assert set(losses) == {"ours-fp32", "ours"}
    assert losses["ours"] == pytest.approx(losses["ours-fp32"], rel=1e-3)
    assert losses["ours"] != losses["ours-fp32"]


def test_floor_counts_operations_and_bytes(
    benchmark: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floors, "SECONDS", 0.1)
    with use_engine(TorchEngine(torch.device("cpu"))):
        floor = benchmark("--floor")["floor"]
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
