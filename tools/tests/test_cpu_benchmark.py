"""The benchmark of small models on a CPU, at its smallest."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]
SIZE = {"num_layers": 2, "dim_model": 64, "num_heads": 2, "dim_head": 32, "dim_ff": 64, "vocab_size": 200}


def test_sides_take_turns_and_agree() -> None:
    command = [sys.executable, "-m", "benchmarks.cpu", "--models", "bert", "gpt2", "gptj", "--rounds", "2"]
    done = subprocess.run(
        [*command, "--tokens", "3", "--threads", "1", "--batch", "3", "--length", "12", "--options", json.dumps(SIZE)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(TOOLS), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    theirs = ["Transformers", "Transformers, eager"]
    assert [row[:3] for row in cells] == [
        *(["bert", "fill in masks", side] for side in ("ours", "Transformers")),
        *(["bert", "training step", side] for side in ("ours", *theirs)),
        *(["gpt2", "decode 3 tokens", side] for side in ("ours", "Transformers", "Transformers, generate")),
        *(["gpt2", "training step", side] for side in ("ours", *theirs)),
        *(["gptj", "decode 3 tokens", side] for side in ("ours", "Transformers", "Transformers, generate")),
        *(["gptj", "training step", side] for side in ("ours", "Transformers")),
    ]
    assert all(float(row[3]) > 0 and float(row[5]) > 0 for row in cells)
    assert "All sides agree on losses and tokens." in done.stdout
