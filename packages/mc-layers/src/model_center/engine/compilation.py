"""Compiled blocks: what torch.compile is given, and whether it can work here."""

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import torch

# Every form of call takes one: training and evaluation, encoder and decoder, with and without a mask, each with one
# length and with changing ones. PyTorch's own limit, 8, is soon passed, and then it computes uncompiled.
_FORMS_OF_CALL = 64

_HINTS = {
    "cpu": "install a C++ compiler such as g++, or name one in the environment variable CXX",
    "cuda": "install the release of triton that belongs to this PyTorch, and a C compiler",
}


def check_settings(
    device: torch.device, *, use_checkpoint: bool | None, compile: bool, activation_budget: float | None
) -> None:
    """Checks an engine's settings of compilation, and compiles something small for `device` where it is asked for.

    Raises:
        ValueError: If the settings do not go together, or that does not work here; the message says why and what to do.
    """
    if activation_budget is not None:
        if not 0 <= activation_budget <= 1:
            raise ValueError(f"`activation_budget` must be from 0 to 1, but is {activation_budget}")
        if not compile:
            raise ValueError(
                f"`activation_budget` must be None without `compile`, but is {activation_budget}: the compiler is what "
                "chooses which activations are kept"
            )
        if use_checkpoint:
            raise ValueError(
                f"`activation_budget` must be None with `use_checkpoint`, but is {activation_budget}: a block whose "
                "activations are all computed again keeps none"
            )
    if compile:
        _check_compiler(device)


def _check_compiler(device: torch.device) -> None:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _FORMS_OF_CALL)
    try:
        torch.compile(_twice_plus_one)(torch.zeros(8, device=device))
    except Exception as error:  # whatever is raised, what follows would raise it, too
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"`compile` must be False here, because torch.compile cannot compile for the device {device.type!r} "
            f"({reason}); {_HINTS.get(device.type, 'see the documentation of torch.compile for this device')}"
        ) from error


def _twice_plus_one(x: torch.Tensor) -> torch.Tensor:
    return 2 * x + 1


def compiled_forward(cls: type[torch.nn.Module], activation_budget: float | None = None) -> Callable[..., Any]:
    """The compiled `forward` of a class: all modules of it share the graphs.

    The first call is compiled for its lengths, the first call with other lengths for any.

    Args:
        cls: A block's class.
        activation_budget: Share of what the compiler would keep for backward by itself that it may keep, beside the
            block's inputs.
    """
    if activation_budget is None:
        return torch.compile(cls.forward)
    from model_center.engine.activation_budget import compiler_keeping

    return torch.compile(cls.forward, backend=compiler_keeping(activation_budget))


def is_value(argument: object) -> bool:
    """Whether an argument is something that a compiled block only reads; caches, for one, are written to.

    What changes from call to call would be compiled again and again.
    """
    if is_dataclass(argument):
        return bool(argument.__dataclass_params__.frozen)  # type: ignore[union-attr]
    return argument is None or isinstance(argument, torch.Tensor | torch.nn.Module | bool | int | float | str)
