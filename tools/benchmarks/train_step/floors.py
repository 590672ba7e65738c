"""The least time that a training step could take: its products at the rate that this device keeps up.

A GPU under full load slows its clock down until it takes no more power than it may, so that the rate of a few products
says too much. (Products between other kernels run faster, because these let the GPU save the power; the step does not.)
Element-wise work is not counted, since a kernel may do it on the way.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from model_center import engine as bmt
from model_center.model import families
from model_center.recipe.arithmetic import training_flops

from .batches import make_batches
from .workloads import Workload

SECONDS = 3.0
COPIED_BYTES = 2**30
BYTES_OF_UPDATE = 28
"""Of each bfloat16 parameter: its gradient is read for clipping and for the update; parameter, the other half of its
master and two moments are read and written."""


@dataclass(frozen=True)
class Floor:
    """What a step of one process needs at least.

    Attributes:
        product_tflop: operations of matrix products and attention, forward and backward, in 10¹².
        product_rate: of bfloat16 products as large as the feed-forward layer's, in TFLOP/s, after some seconds.
        first_product_rate: of the first 20 milliseconds.
        update_gb: bytes that the optimizer reads and writes, in 10⁹.
        copy_rate: of a large copy, in GB/s read and written.
        samples: rows of a step.
    """

    product_tflop: float
    product_rate: float
    first_product_rate: float
    update_gb: float
    copy_rate: float
    samples: int

    @property
    def product_milliseconds(self) -> float:
        """Time of the products."""
        return 1e3 * self.product_tflop / self.product_rate

    @property
    def update_milliseconds(self) -> float:
        """Time of the optimizer."""
        return 1e3 * self.update_gb / self.copy_rate

    @property
    def samples_per_second(self) -> float:
        """What products at the lasting rate leave room for."""
        return 1e3 * self.samples / (self.product_milliseconds + self.update_milliseconds)

    def report(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**asdict(self), "samples_per_second": self.samples_per_second}


def floor_of(workload: Workload) -> Floor:
    """Measures this device's rates, and counts what the workload needs."""
    bmt.init_distributed(seed=0)
    device = bmt.current_engine().device
    config = workload.config(torch.bfloat16)
    with bmt.use_engine(bmt.TorchEngine(torch.device("meta"))):
        parameters = sum(parameter.numel() for parameter in families[workload.family](config).parameters())
    batch = make_batches(workload, config.vocab_size, 1, seed=0)[0]
    decoder = () if batch.decoder_ids is None else [batch.decoder_ids.shape[1]] * len(batch.real)
    operations = training_flops(config, batch.real, decoder, targets=batch.targets).model
    sizes = sum(batch.real), config.dim_model, config.dim_ff
    first, lasting = _product_rates(*sizes, device)
    return Floor(
        product_tflop=operations / 1e12,
        product_rate=lasting / 1e12,
        first_product_rate=first / 1e12,
        update_gb=BYTES_OF_UPDATE * parameters / 1e9,
        copy_rate=_copy_rate(device) / 1e9,
        samples=workload.batch,
    )


def _product_rates(rows: int, inner: int, columns: int, device: torch.device) -> tuple[float, float]:
    """Operations a second of the first moments and of the second half of `SECONDS`."""
    left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    right = torch.randn(inner, columns, device=device, dtype=torch.bfloat16)
    output = torch.empty(rows, columns, device=device, dtype=torch.bfloat16)

    def multiply() -> None:
        torch.mm(left, right, out=output)

    once = 2 * rows * inner * columns
    _times_a_second(multiply, 0.02)  # the library chooses its kernel, the clock rises
    first = _times_a_second(multiply, 0.02)
    _times_a_second(multiply, SECONDS / 2)
    return once * first, once * _times_a_second(multiply, SECONDS / 2)


def _copy_rate(device: torch.device) -> float:
    source = torch.empty(COPIED_BYTES, device=device, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES * _times_a_second(lambda: target.copy_(source), 0.2)


def _times_a_second(work: Callable[[], object], seconds: float) -> float:
    """How often a second something is done, when it is done for about so long."""
    done, at_once = 0, 1
    bmt.synchronize()
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        for _ in range(at_once):
            work()
        bmt.synchronize()
        done += at_once
        at_once = min(2 * at_once, 64)
    return done / passed


def floor_table(name: str, floor: Floor) -> Table:
    """As a table."""
    table = Table("what", "needed", "rate", "ms", title=f"{name}: at most {floor.samples_per_second:.1f} samples/s")
    rate = f"{floor.product_rate:.0f} TFLOP/s (at first {floor.first_product_rate:.0f})"
    table.add_row("products", f"{floor.product_tflop:.1f} TFLOP", rate, f"{floor.product_milliseconds:.1f}")
    rate = f"{floor.copy_rate:,.0f} GB/s"
    table.add_row("optimizer", f"{floor.update_gb:.1f} GB", rate, f"{floor.update_milliseconds:.1f}")
    return table
