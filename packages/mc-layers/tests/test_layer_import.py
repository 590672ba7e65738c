"""What importing the layers costs, and what the compiler is told without importing it."""

import subprocess
import sys

import torch

from model_center.layer.kernels import requirements

IMPORT = """
import sys
import torch
from model_center import layer
from model_center.layer import Linear
layer.Encoder(num_layers=1, dim_model=8, dim_ff=16, num_heads=2, dim_head=4, dtype=torch.float32)
print("torch._dynamo" in sys.modules)
"""


def test_the_compiler_is_not_imported_before_it_is_used() -> None:
    """It takes as long as PyTorch itself, which a program that only computes outputs need not wait for."""
    imported = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout
    assert imported == "False\n"


def test_the_mark_of_constants_is_pytorchs() -> None:
    def function() -> None: ...

    torch.compiler.assume_constant_result(function)
    assert vars(function)
    assert vars(requirements._suit) == vars(function)
