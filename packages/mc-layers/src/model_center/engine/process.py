"""This process among the others, and what they tell each other. All of it works in a single process."""

from typing import Any

import torch

from model_center.engine import distributed
from model_center.engine.current import current_engine


def rank() -> int:
    """Number of this process among all, from 0."""
    return current_engine().rank


def world_size() -> int:
    """Number of processes that train together."""
    return current_engine().world_size


def synchronize() -> None:
    """Waits until all processes are here and their devices have finished the work given to them."""
    current_engine().synchronize()


def print_rank(*args: object, rank: int = 0, **kwargs: Any) -> None:
    """Prints on one process only.

    Args:
        *args: What `print` takes.
        rank: Number of the process that prints.
        **kwargs: Options of `print`.
    """
    if current_engine().rank == rank:
        print(*args, **kwargs)  # noqa: T201 - printing is what it is for


def init_parameters(module: torch.nn.Module) -> None:
    """Fills the parameters of all layers in `module` with fresh values, as their constructors' options say.

    Parameters that do not come from `model_center.layer` keep their values.
    """
    current_engine().init_parameters(module)


def sum_loss(loss: torch.Tensor) -> torch.Tensor:
    """The loss (any shape) averaged over all processes; the name is BMTrain's."""
    return distributed.all_reduce(loss, "avg")


def gather_result(result: torch.Tensor) -> torch.Tensor:
    """The results of all processes, one after another.

    Args:
        result: Shape (n, ...); processes may differ in n, but in nothing else.

    Returns:
        Shape (sum of all n, ...), in the order of ranks, on the device of `result`.

    Raises:
        ValueError: If `result` is a scalar.
    """
    if result.dim() == 0:
        raise ValueError("`result` must have at least one dimension, but is a scalar; use `result.unsqueeze(0)`")
    lengths = distributed.all_gather(torch.tensor(len(result))).tolist()
    padding = result.new_zeros(max(lengths) - len(result), *result.shape[1:])
    gathered = distributed.all_gather(torch.cat([result, padding]))
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])
