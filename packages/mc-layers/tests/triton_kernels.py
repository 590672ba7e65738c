"""Where tests of Triton kernels run: on a GPU, or else in a child process with Triton's interpreter."""

import os
import subprocess
import sys
from typing import Any

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


def compile_instead_of_running(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on, kernels that are launched are compiled for an H100 and do not run; returns where their names go."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names: list[str] = []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        del grid, warmup
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        launch = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
        constants = {param.name for param in kernel.params if param.is_constexpr or values[param.name] is None}
        signature = {name: "constexpr" if name in constants else _type_name(values[name]) for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): values[name] for name in constants}
        binary = triton.compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32), options=launch)
        assert binary.asm["cubin"]
        names.append(kernel.__name__)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_only)
    return names


def _type_name(value: object) -> str:
    """Triton's name of an argument's type."""
    if isinstance(value, torch.Tensor):
        names = {torch.bool: "i1", torch.int32: "i32", torch.int64: "i64", torch.float32: "fp32", torch.float16: "fp16"}
        return "*" + (names | {torch.bfloat16: "bf16", torch.float64: "fp64", torch.int16: "i16"})[value.dtype]
    return {bool: "i1", int: "i32", float: "fp32"}[type(value)]
