"""Where the parts of a run are worked on."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerDiedError(RuntimeError):
    """A worker process ended without an exception, as when the system runs out of memory."""


class Executor(Protocol):
    """Runs tasks that do not depend on each other."""

    def run(self, setup: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task]) -> Generator[Result]:
        """Call what `setup` returns on every task.

        Args:
            setup: Called once in every worker.
            tasks: What the workers get.

        Yields:
            The results, in the order in which they are ready.
        """
        ...


class LocalExecutor:
    """Processes of this machine.

    Args:
        workers: Number of processes; 1 works in the calling process.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"`workers` must be at least 1, but is {workers}")
        self.workers = workers

    def run(self, setup: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task]) -> Generator[Result]:
        """Call what `setup` returns on every task (see `Executor`)."""
        workers = min(self.workers, len(tasks))
        if workers <= 1:
            if tasks:
                yield from map(setup(), tasks)
            return
        # Spawned, as forking a process that has threads (progress, tokenizers) can deadlock the child.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(setup,))
        try:
            for future in as_completed([pool.submit(_work, task) for task in tasks]):
                yield future.result()
        except BrokenProcessPool as error:
            raise WorkerDiedError("a worker process died; the system may have run out of memory") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_function: Callable[[Any], Any]


def _start_worker(setup: Callable[[], Callable[[Any], Any]]) -> None:
    global _function  # noqa: PLW0603  # the one thing a pool's worker keeps between tasks
    # One process per core: the tokenizers library need not start threads of its own on top.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = setup()


def _end_with_parent() -> None:
    """End this worker when the process that started it is killed, instead of waiting for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: Any) -> Any:
    return _function(task)
