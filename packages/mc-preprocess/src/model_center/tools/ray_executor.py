"""Parts worked on by a Ray cluster, which must share a file system with the process that starts the run."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from .executors import Result, Task, WorkerDiedError


class RayExecutor:
    """Runs tasks on the Ray cluster that `RAY_ADDRESS` names or that runs on this machine; else starts one here.

    A part whose node dies is given to another node. Parts are written all or nothing and do not depend on each other,
    so the result is the same, byte for byte, as that of one process.

    Args:
        workers: How many parts are worked on at a time, in the whole cluster.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"`workers` must be at least 1, but is {workers}")
        self.workers = workers

    def run(self, setup: Callable[[], Callable[[Task], Result]], tasks: Sequence[Task]) -> Generator[Result]:
        """Call what `setup` returns on every task (see `Executor`)."""
        try:
            import ray
        except ImportError as error:
            raise ImportError("`executor` ray needs the extra: pip install 'mc-preprocess[ray]'") from error
        connected = ray.is_initialized()
        if not connected:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        try:
            dumps: Callable[[Any], bytes] = ray.cloudpickle.dumps
            pickled = ray.put(dumps(setup))
            folder = str(Path.cwd())
            call = ray.remote(num_cpus=1, max_retries=10)(_call)
            waiting = iter(tasks)
            pending: list[Any] = []
            while True:
                free = itertools.islice(waiting, self.workers - len(pending))
                pending += [call.remote(pickled, folder, task) for task in free]
                if not pending:
                    break
                (done,), pending = ray.wait(pending, num_returns=1)
                yield _result(ray, done)
        finally:
            if not connected:
                ray.shutdown()


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # what the worker raised, without Ray's wrapping
    except ray.exceptions.RayError as error:
        raise WorkerDiedError(f"Ray gave up on a part: {error}") from error


def _call(pickled: bytes, folder: str, task: Any) -> Any:
    """Work on one task in a Ray worker."""
    os.chdir(folder)  # paths mean what they mean where the run was started
    return _prepared(pickled)(task)


@functools.lru_cache(maxsize=1)
def _prepared(pickled: bytes) -> Callable[[Any], Any]:
    """Set a worker up once, not for each of its tasks."""
    import ray

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    setup: Callable[[], Callable[[Any], Any]] = ray.cloudpickle.loads(pickled)
    return setup()
