"""Checks shared by the layers; each names the parameter, the rule and the value found."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def check_last_dim(name: str, tensor: Tensor, dim_name: str, dim: int) -> None:
    """Raise a ValueError unless the last dimension of `tensor` is `dim`."""
    if tensor.dim() == 0 or tensor.shape[-1] != dim:
        raise ValueError(
            f"the last dimension of `{name}` must be `{dim_name}` ({dim}), but its shape is {tuple(tensor.shape)}"
        )


def check_positive(**sizes: int) -> None:
    """Raise a ValueError unless every size is a positive integer."""
    for name, size in sizes.items():
        if isinstance(size, float) or size < 1:
            raise ValueError(f"`{name}` must be a positive integer, but is {size!r}")


def check_probability(**probabilities: float) -> None:
    """Raise a ValueError unless every probability lies in [0, 1)."""
    for name, probability in probabilities.items():
        if not 0 <= probability < 1:
            raise ValueError(f"`{name}` must be at least 0 and less than 1, but is {probability!r}")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise a ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, but is {value!r}")
