"""Where tests of Triton kernels run: on a GPU, or else in a child process with Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch

COMPILED = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if COMPILED else "cpu")
runs_kernels = pytest.mark.skipif(not (COMPILED or INTERPRETED), reason="runs in test_interpreted's process")
starts_interpreter = pytest.mark.skipif(COMPILED or INTERPRETED, reason="the kernels run in this process")


def run_interpreted(file: str, *options: str) -> None:
    """Runs a test file again with Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "--no-header", *options]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
