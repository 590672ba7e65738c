"""What a step of pre-training took: tokens, time, operations, memory."""

import resource
import sys

import torch

from model_center import engine

from .arithmetic import peak_flops, training_flops
from .memory_prediction import GIB
from .metrics import StepMetrics
from .pretraining_data import StepBatches
from .pretraining_job import PretrainingJob


def measure(
    job: PretrainingJob, batches: StepBatches, seconds: float, loss: float, gradient_norm: float, learning_rate: float
) -> StepMetrics:
    """Return the metrics of a step that is done. All processes must call it.

    Args:
        job: the run.
        batches: the step's batches of this process.
        seconds: what the step took.
        loss: mean over the target tokens of the step.
        gradient_norm: norm of all gradients before clipping.
        learning_rate: learning rate of the step.
    """
    config, world_size = job.config, engine.world_size()
    own_tokens = sum(batch.tokens for batch in batches.batches)
    own_flops = sum(
        training_flops(job.model.config, *batch.lengths, targets=batch.targets).model for batch in batches.batches
    )
    counted = torch.tensor([own_tokens, own_flops], dtype=torch.float64)
    tokens, flops = engine.distributed.all_reduce(counted, "sum").tolist()
    rate = flops / seconds / world_size
    peak = peak_flops(engine.current_engine().device, next(job.model.parameters()).dtype)
    return StepMetrics(
        step=job.step,
        epoch=job.step * config.batch.global_size / job.data.total,
        loss=loss,
        learning_rate=learning_rate,
        gradient_norm=gradient_norm,
        seconds=seconds,
        samples_per_second=config.batch.global_size / seconds,
        tokens=int(tokens),
        tokens_per_second=tokens / seconds,
        tflops=rate / 1e12,
        peak_share=None if peak is None else rate / peak,
        memory_gib=peak_memory() / GIB,
        loss_scale=job.manager.loss_scale if job.manager.loss_scale_enabled else None,
    )


def peak_memory() -> int:
    """Return the most bytes so far that tensors have taken of a GPU or, on a CPU, that this process has taken."""
    device = engine.current_engine().device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
