"""Recomputation of a block's activations in backward, without a wrapper around the block."""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from model_center.engine.base import ModuleT


class _CheckpointBlock(torch.nn.Module):
    """Mixed into the class of a block. Takes no keyword arguments, because BMTrain's blocks drop them unsaid."""

    recompute: bool

    def forward(self, *args: Any) -> Any:
        """Runs the block's own forward."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(super().forward, *args, use_reentrant=False)
        return super().forward(*args)


def as_checkpoint_block(module: ModuleT, recompute: bool) -> ModuleT:
    """Changes the class of `module` to one whose forward recomputes its activations in backward.

    A changed class, rather than a wrapper or a replaced bound method, survives copying, leaves names alone, and
    composes with `fully_shard` (which does the same) and `Module.compile`.
    """
    if not isinstance(module, _CheckpointBlock):
        block: Any = module
        block.__class__ = _block_class(type(module))
        block.recompute = recompute
    return module


_block_classes: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


def _block_class(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    if cls not in _block_classes:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        _block_classes[cls] = type(cls.__name__, (_CheckpointBlock, cls), names)
    return _block_classes[cls]
