"""One process that trains: it does what it reads from its input, line by line, and answers in JSON lines.

The commands are `measure STEPS`, `profile`, `losses STEPS` and `load FILE` / `save FILE` (weights by our names).
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TextIO

import torch
from shared_gpus import take_place

from model_center import engine as bmt
from model_center.recipe.arithmetic import training_flops

from .batches import WORDS_OF_CURVES, Batch, make_batches
from .trainees import CALM_LR, Trainee, make_trainee
from .workloads import Setting, Workload

BATCHES = 4
GIB = 2**30


class Worker:
    """A trainee, its data, and what can be asked of it."""

    def __init__(self, workload: Workload, setting: Setting, cap_gib: float | None) -> None:
        self.workload, self.setting = workload, setting
        if cap_gib is not None and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(cap_gib * GIB / total, int(os.environ.get("LOCAL_RANK", "0")))
        self.trainee: Trainee = make_trainee(workload, setting)
        self.on_gpu = bmt.current_engine().device.type == "cuda"
        self.batches = self._batches(workload)
        self.peak = 0

    def _batches(self, workload: Workload) -> list[Batch]:
        made = make_batches(workload, self.trainee.config.vocab_size, BATCHES, seed=bmt.rank())
        return [self._to_device(batch) for batch in made]

    def _to_device(self, batch: Batch) -> Batch:
        return batch.to(bmt.current_engine().device, labels=self.setting.side != "ours")

    def measure(self, steps: int) -> dict[str, Any]:
        """Steps that are timed, after one for each batch that is not (compilation, and memory from the device)."""
        self._run(self.batches)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        batches = list(islice(cycle(self.batches), steps))
        bmt.synchronize()
        start = time.perf_counter()
        losses = self._run(batches)
        bmt.synchronize()
        seconds = (time.perf_counter() - start) / steps
        peak = torch.cuda.max_memory_allocated() / GIB if self.on_gpu else None
        reserved = torch.cuda.max_memory_reserved() / GIB if self.on_gpu else None
        if self.on_gpu:
            torch.cuda.empty_cache()  # for those that wait beside this one
        mean = sum(map(self._flops, batches)) / steps
        return {
            "seconds": seconds,
            "samples": self.workload.batch * bmt.world_size(),
            "tokens": sum(map(tokens_of, batches)) / steps * bmt.world_size(),
            "flops": mean,
            "peak_gib": peak,
            "reserved_gib": reserved,
            "loss": losses[-1],
        }

    def _run(self, batches: list[Batch]) -> list[float]:
        return torch.stack([self.trainee.step(batch) for batch in batches]).tolist()

    def _flops(self, batch: Batch) -> int:
        decoder = () if batch.decoder_ids is None else [batch.decoder_ids.shape[1]] * len(batch.real)
        return training_flops(self.trainee.config, batch.real, decoder, targets=batch.targets).model

    def losses(self, steps: int) -> dict[str, Any]:
        """The losses of steps on batches that differ, and a fingerprint of the weights after them."""
        made = make_batches(
            self.workload, self.trainee.config.vocab_size, steps, seed=7 + bmt.rank(), most_words=WORDS_OF_CURVES
        )
        start = time.perf_counter()
        losses = [self.trainee.step(self._to_device(batch)) for batch in made]
        values = torch.stack(losses).tolist()
        digest = hashlib.sha256()
        for tensor in bmt.current_engine().state_dict(self.trainee.module).values():
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return {"losses": values, "weights": digest.hexdigest(), "seconds": (time.perf_counter() - start) / steps}

    def load(self, path: str) -> dict[str, Any]:
        """Weights that `save` wrote, in this one's type, beside masters that are not rounded to it."""
        bmt.load(self.trainee.module, path)
        self.trainee.new_optimizer(CALM_LR)
        self.trainee.set_masters(torch.load(path, weights_only=True, mmap=True))
        return {}

    def save(self, path: str) -> dict[str, Any]:
        """Writes the weights, and goes on from these."""
        self.trainee.new_optimizer(CALM_LR)
        bmt.save(self.trainee.module, Path(path))
        return {}

    def profile(self) -> dict[str, Any]:
        """The kernels of three steps, by the time that they take."""
        from torch.profiler import ProfilerActivity, profile

        steps = 3
        self._run(self.batches)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        bmt.synchronize()
        start = time.perf_counter()
        with profile(activities=activities) as profiler:
            self._run(self.batches[:steps])
            bmt.synchronize()
        seconds = (time.perf_counter() - start) / steps
        kernels: dict[str, list[float]] = {}
        for event in profiler.key_averages():
            device = str(event.device_type).endswith("CUDA")
            if device != self.on_gpu:
                continue
            spent = event.self_device_time_total if self.on_gpu else event.self_cpu_time_total
            kernels[event.key] = [spent / steps / 1000, event.count / steps]
        return {"milliseconds": 1000 * seconds, "kernels": kernels}


def serve(worker: Worker, commands: TextIO, answer: Callable[[dict[str, Any]], None]) -> None:
    """Does what it is told until there are no more commands."""
    for line in commands:
        name, *rest = line.split(maxsplit=1)
        arguments: list[Any] = [int(value) if value.isdigit() else value for value in (each.strip() for each in rest)]
        answer(getattr(worker, name)(*arguments))


def tokens_of(batch: Batch) -> int:
    """Real tokens that a batch trains on."""
    return sum(batch.real) + (0 if batch.decoder_ids is None else batch.decoder_ids.numel())


def main() -> None:
    """Answers to the standard output that it was started with; what libraries print goes to the error output."""
    take_place()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job.get("threads", torch.get_num_threads()))

    def answer(value: dict[str, Any]) -> None:
        if bmt.rank() == 0:
            print(json.dumps(value), file=channel, flush=True)

    worker = Worker(Workload(**job["workload"]), Setting(**job["setting"]), job["cap_gib"])
    worker._run(worker.batches[:1])
    if worker.on_gpu:
        torch.cuda.empty_cache()
    answer({"parameters": sum(parameter.numel() for parameter in worker.trainee.module.parameters())})
    serve(worker, sys.stdin, answer)
    bmt.current_engine().shutdown()


if __name__ == "__main__":
    main()
