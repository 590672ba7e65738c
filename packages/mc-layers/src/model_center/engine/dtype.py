"""`HALF`: the data type that `dtype=torch.float16` means in documented signatures."""

from typing import cast

import torch


class _Half:
    """Equals and prints as `torch.float16`, but can be told from it: an explicit `torch.float16` always wins."""

    def __eq__(self, other: object) -> bool:
        return other is torch.float16 or isinstance(other, _Half)

    def __hash__(self) -> int:
        return hash(torch.float16)

    def __repr__(self) -> str:
        return repr(torch.float16)

    def __reduce__(self) -> str:
        # Copies and pickles are the module's one object.
        return "HALF"


HALF: torch.dtype = cast(torch.dtype, _Half())
"""The engine's half type: float16 on CUDA, float32 on CPU. `current_engine().resolve_dtype` makes it a real dtype."""


def is_half(dtype: object) -> bool:
    """Whether `dtype` is the sentinel `HALF` (and not `torch.float16` itself)."""
    return isinstance(dtype, _Half)
