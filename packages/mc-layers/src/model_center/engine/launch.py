"""Several processes that torchrun (or any other launcher) started: how they find each other, and how they fail."""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

JOIN_TIMEOUT = timedelta(minutes=5)
"""How long a process waits for the others to start."""
_SIGNS_OF_A_LOST_PARTNER = ("closed by peer", "reset by peer", "remote process exited")
_SECONDS_TO_FIND_THE_CAUSE = 5.0


@dataclass(frozen=True)
class Place:
    """A process's place among those that were launched together.

    Attributes:
        rank: Its number among all.
        local_rank: Its number among those on the same machine.
        world_size: How many there are.
    """

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> "Place":
        """Reads `RANK`, `LOCAL_RANK` (by default the rank) and `WORLD_SIZE`, as torchrun sets them.

        Raises:
            ValueError: If one is missing or out of range.
        """
        world_size = _number(environment, "WORLD_SIZE")
        rank = _number(environment, "RANK")
        local_rank = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else rank
        if world_size < 1:
            raise ValueError(f"`WORLD_SIZE` must be at least 1, but is {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"`RANK` must be from 0 to WORLD_SIZE - 1 = {world_size - 1}, but is {rank}")
        return cls(rank, local_rank, world_size)


def launched_size(environment: Mapping[str, str]) -> int:
    """Number of processes that were launched together; 1 without a launcher.

    Raises:
        ValueError: If `WORLD_SIZE` is no number.
    """
    return _number(environment, "WORLD_SIZE") if "WORLD_SIZE" in environment else 1


def device_of(place: Place) -> torch.device:
    """The device of a process: the GPU of its local rank, or the CPU if there are no GPUs.

    Raises:
        ValueError: If this machine has GPUs, but fewer than processes.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"`LOCAL_RANK` must be below the number of GPUs, {torch.cuda.device_count()}, but is {place.local_rank}: "
            "start as many processes as there are GPUs (torchrun --nproc_per_node), or hide all GPUs to use CPUs"
        )
    return torch.device("cuda", place.local_rank)


def join(place: Place, device: torch.device) -> None:
    """Starts torch.distributed between all processes, with NCCL for GPUs and gloo for CPUs, unless it runs already.

    Raises:
        ValueError: If the processes do not find each other; the message says what to change.
    """
    if not dist.is_initialized():
        store = _meet(place)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", store=store, rank=place.rank, world_size=place.world_size, device_id=device)
        else:
            dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size)
    elif (dist.get_rank(), dist.get_world_size()) != (place.rank, place.world_size):
        raise ValueError(
            f"`RANK` and `WORLD_SIZE` must be those of torch.distributed, {dist.get_rank()} of {dist.get_world_size()},"
            f" which has been started already, but are {place.rank} of {place.world_size}"
        )
    report_failures()  # after PyTorch has put a hook of its own there


def _meet(place: Place) -> Store:
    """The store through which processes find each other, once all of them are there."""
    address = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
    seconds = JOIN_TIMEOUT.total_seconds()
    try:
        store, _, _ = next(rendezvous("env://", place.rank, place.world_size, timeout=JOIN_TIMEOUT))
    except (dist.DistError, ValueError) as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"`MASTER_PORT` must be a free port, but another program listens at {address}; choose another one, or "
                "let torchrun find one with --standalone"
            ) from error
        raise ValueError(
            f"process {place.rank} could not meet all of `WORLD_SIZE` = {place.world_size} processes at {address} "
            f"within {seconds:g} s; start exactly that many with the same address and port ({_first_line(error)})"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"model_center/{attempt}", store)
    if store.add(f"rank {place.rank}", 1) > 1:
        raise ValueError(f"`RANK` must differ between processes, but two of them have {place.rank}")
    try:
        store.wait([f"rank {rank}" for rank in range(place.world_size)], JOIN_TIMEOUT)
    except dist.DistError as error:
        missing = [str(rank) for rank in range(place.world_size) if not store.check([f"rank {rank}"])]
        raise ValueError(
            f"`WORLD_SIZE` must be the number of processes, but is {place.world_size}, and ranks {', '.join(missing)} "
            f"have not come within {seconds:g} s"
        ) from error
    return store


def report_failures() -> None:
    """Lets torchrun tell the error that came first, rather than "process exited with code 1".

    It reads it from a file that it names in the environment; without torchrun nothing changes.
    """
    if "TORCHELASTIC_ERROR_FILE" not in os.environ or getattr(sys.excepthook, "reports_failures", False):
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    before = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
        before(kind, error, trace)
        if any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PARTNER):
            # torchrun takes the first error for the cause, and has to find out about a killed process by itself.
            time.sleep(_SECONDS_TO_FIND_THE_CAUSE)
        try:
            raise error.with_traceback(trace)  # the handler writes the exception that is being handled
        except BaseException as raised:  # noqa: BLE001 - whatever it is, it is what ended this process
            get_error_handler().record_exception(raised)

    report.reports_failures = True  # type: ignore[attr-defined]
    sys.excepthook = report


def _number(environment: Mapping[str, str], name: str) -> int:
    if name not in environment:
        raise ValueError(
            f"`{name}` must be set in the environment of one of several processes, but is not; start them with torchrun"
        )
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"`{name}` must be a whole number, but is {environment[name]!r}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
