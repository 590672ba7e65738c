"""Blocks that recompute their activations in backward or are compiled, without a wrapper around them."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from model_center.engine.base import ModuleT
from model_center.engine.compilation import compiled_forward, is_value


class _Block(torch.nn.Module):
    """Mixed into the class of a block. Takes no keyword arguments, because BMTrain's blocks drop them unsaid."""

    recompute: bool
    compiled: Callable[..., Any] | None
    _made_of: tuple[type[torch.nn.Module], bool, float | None]

    def forward(self, *args: Any) -> Any:
        """Runs the block's own forward."""
        run = super().forward if self.compiled is None or not all(map(is_value, args)) else self.compiled
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=False)
        return run(*args)

    def __reduce_ex__(self, protocol: Any) -> str | tuple[Any, ...]:
        """Pickles what the block's own class does, which is found by its name, and how to make that a block."""
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        if isinstance(reduced, str) or "_made_of" not in vars(cls):  # `fully_shard` has changed the class again
            return reduced
        own_class, compiles, activation_budget = self._made_of
        make, arguments, *state = reduced
        call = tuple(own_class if part is cls else part for part in (make, *arguments))
        return _unpickled_block, (call, self.recompute, compiles, activation_budget), *state


def _unpickled_block(
    call: tuple[Any, ...], recompute: bool, compiles: bool, activation_budget: float | None
) -> torch.nn.Module:
    """Calls the first of `call` with the others, and makes a block of the module that comes back; pickles name this."""
    make, *arguments = call
    module: torch.nn.Module = make(*arguments)
    return as_block(module, recompute=recompute, compiles=compiles, activation_budget=activation_budget)


def as_block(module: ModuleT, *, recompute: bool, compiles: bool, activation_budget: float | None = None) -> ModuleT:
    """Changes the class of `module` to one whose forward is compiled, and recomputes its activations in backward.

    A changed class, rather than a wrapper or a replaced bound method, survives copying and pickling, leaves names
    alone, and composes with `fully_shard` (which does the same) and `Module.compile`.
    """
    if not isinstance(module, _Block):
        block: Any = module
        own_class: Any = type(module)
        block.__class__ = _block_class(own_class, compiles, activation_budget)
        block.recompute = recompute
    return module


@cache
def _block_class(cls: type[torch.nn.Module], compiles: bool, activation_budget: float | None) -> type[torch.nn.Module]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    compiled = compiled_forward(cls, activation_budget) if compiles else None
    made_of = (cls, compiles, activation_budget)
    return type(cls.__name__, (_Block, cls), {**names, "compiled": compiled, "_made_of": made_of})
