"""Runs that repeat bit by bit: the settings of this process that they take."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_REPEATABLE_WORKSPACES = (":4096:8", ":16:8")


@contextmanager
def deterministic_algorithms(*, compiles: bool) -> Iterator[None]:
    """Lets PyTorch compute the same bits in every run, and restores all settings in the end.

    An operation that has no such form raises a RuntimeError that names it.

    Source: the notes on reproducibility in PyTorch's documentation, and NVIDIA's on cuBLAS.

    Args:
        compiles: Whether PyTorch's compiler has to follow, whose import takes seconds.
    """
    cudnn, workspace = torch.backends.cudnn, os.environ.get(_CUBLAS)
    benchmark, enabled = cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if workspace not in _REPEATABLE_WORKSPACES:
        os.environ[_CUBLAS] = _REPEATABLE_WORKSPACES[0]
    cudnn.benchmark = False  # it takes the fastest algorithm of the moment, and so does the compiler
    torch.use_deterministic_algorithms(True)
    try:
        with _deterministic_compiler() if compiles else nullcontext():
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(_CUBLAS, None)
        else:
            os.environ[_CUBLAS] = workspace


def _deterministic_compiler() -> AbstractContextManager[object]:
    import torch._inductor.config

    compiler: AbstractContextManager[object] = torch._inductor.config.patch(deterministic=True)
    return compiler
