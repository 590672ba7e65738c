"""The base class of all layers."""

from __future__ import annotations

from typing import Any, Self

import torch

from model_center.engine import Initializer, current_engine

NO_TRAINING = (
    "a layer with `int8=True` stores its weights in 8 bits for inference and can't be trained; "
    "build the model with int8=False to train it, or run it under torch.no_grad()"
)


class Module(torch.nn.Module):
    """A `torch.nn.Module` whose class and parameters come from the current engine.

    Engines that shard parameters need to know of them when they are made, so the seam is construction: the engine
    says which class to allocate, and `parameter` asks it for each weight. The `torch.nn.Module` part of the object is
    ready before `__init__`, so subclasses may be dataclasses (`@dataclass(eq=False, repr=False)`, children and
    parameters made in `__post_init__`) or have an ordinary `__init__`, with or without `super().__init__()`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:  # noqa: ARG004 - these are for __init__
        """Allocate the class that the current engine asks for."""
        module = object.__new__(current_engine().module_class(cls))
        torch.nn.Module.__init__(module)
        return module

    def __init__(self) -> None:
        """Do nothing: `__new__` has done it, and doing it again would forget what is already there."""

    def parameter(self, *shape: int, dtype: torch.dtype, init: Initializer) -> torch.nn.Parameter:
        """Make a parameter of the current engine.

        Args:
            shape: Size of each dimension.
            dtype: Its type; `HALF` for the engine's half type.
            init: How it is filled, e.g. `Normal(mean, std)`.
        """
        return current_engine().parameter(*shape, dtype=dtype, init=init)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Refuse to train a module with 8-bit weights; otherwise as in PyTorch."""
        if requires_grad and any(getattr(module, "int8", False) for module in self.modules()):
            raise ValueError(NO_TRAINING)
        return super().requires_grad_(requires_grad)
