"""What the processes of a run tell each other beside tensors: small values, and whether something failed somewhere."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from model_center import engine

ResultT = TypeVar("ResultT")


def from_all(value: Any) -> list[Any]:
    """Return the values (of JSON) of all processes, in their order. All must call it."""
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    if engine.world_size() == 1:
        return [value]
    lengths = engine.distributed.all_gather(torch.tensor(len(data))).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(data)] = data
    gathered = engine.distributed.all_gather(padded)
    return [
        json.loads(bytes(row[:length].tolist()).decode()) for row, length in zip(gathered.cpu(), lengths, strict=True)
    ]


def from_first(value: Any) -> Any:
    """Return the value (of JSON) of the first process. All must call it; what the others give is ignored."""
    return from_all(value if engine.rank() == 0 else None)[0]


def raise_together(error: Exception | None) -> None:
    """Raise on every process if there is an error on any. All must call it.

    Args:
        error: what went wrong on this process.

    Raises:
        OSError: there are errors, one of which is not a ValueError; the message holds all of them.
        ValueError: there are only ValueErrors; likewise.
    """
    found = from_all(None if error is None else [isinstance(error, ValueError), _told(error)])
    errors = [(rank, *each) for rank, each in enumerate(found) if each is not None]
    if not errors:
        return
    if len({text for _, _, text in errors}) == 1:  # found by all of them, or there is one process
        message = errors[0][2] if len(errors) == len(found) else f"process {errors[0][0]}: {errors[0][2]}"
    else:
        message = "\n".join(f"process {rank}: {text}" for rank, _, text in errors)
    kind = ValueError if all(is_value_error for _, is_value_error, _ in errors) else OSError
    raise kind(message) from error


def together(work: Callable[[], ResultT]) -> ResultT:
    """Do something on every process that may fail on some, without communication in it, and then fail on all.

    Raises:
        OSError, ValueError: as `raise_together`.
    """
    error: Exception | None = None
    result: ResultT | None = None
    try:
        result = work()
    except (OSError, ValueError) as caught:
        error = caught
    raise_together(error)
    return result  # type: ignore[return-value] # there is one where nothing was raised


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__
