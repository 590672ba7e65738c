"""Workers as their parent sees them: started, asked, ended; each in processes of its own."""

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from .workloads import Setting, Workload

TOOLS = Path(__file__).resolve().parents[2]


class WorkerError(Exception):
    """A worker failed; the message is the last thing that it wrote."""


class WorkerProcess:
    """The processes of one setting."""

    def __init__(
        self, workload: Workload, setting: Setting, *, processes: int, cap_gib: float | None, limit_s: float
    ) -> None:
        self.limit_s = limit_s
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the processes
        job = json.dumps({"workload": asdict(workload), "setting": asdict(setting), "cap_gib": cap_gib})
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.train_step.worker", job],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=self._errors,
                text=True,
                env=_environment(rank, processes, port),
            )
            for rank in range(processes)
        ]
        self.started: Mapping[str, Any] | None = None

    def wait_until_ready(self) -> Mapping[str, Any]:
        """Waits for the first step; tells the number of parameters."""
        if self.started is None:
            self.started = self._answer()
        return self.started

    def ask(self, command: str) -> dict[str, Any]:
        """What a command of `worker.py` returns."""
        self.wait_until_ready()
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(command + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                raise WorkerError(self._last_words()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        first = self._processes[0]
        assert first.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(first.stdout, selectors.EVENT_READ)
            end = time.monotonic() + self.limit_s
            while not selector.select(timeout=1):
                if any(process.poll() for process in self._processes):
                    break
                if time.monotonic() > end:
                    raise WorkerError(f"no answer within {self.limit_s:g} s")
        line = "" if any(process.poll() for process in self._processes) else first.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line.split(":")[0]]
        return (errors or lines or ["it ended without a word"])[-1][:400]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.close()  # which ends it
                process.wait(timeout=20 if kind is None else 0)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._errors.close()


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    paths = [str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    several = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, **place} if processes > 1 else {}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **{name: str(value) for name, value in several.items()}}
