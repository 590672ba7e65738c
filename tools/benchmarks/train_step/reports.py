"""What the measurements come to: rows of a table, and kernels by what they do."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.table import Table

ROOFLINE_TFLOPS = 790.0
"""Rate of bfloat16 matrix products measured on an H200 and an H100 (8192 × 8192 × 8192, random data)."""

KINDS = {
    "matrix products": r"gemm|nvjet|cublas|xmma|::(add|b)?mm\b",
    "attention": r"flash|fmha|cudnn.*sdpa|attention|attend|efficient|softmax",
    "optimizer and clipping": r"multi_tensor|FusedAdam|adam|foreach|lpnorm",
    "copies": r"memcpy|memset|copy_kernel|direct_copy",
    "communication": r"nccl",
    "compiled pointwise and norms": r"triton_",
}


@dataclass(frozen=True)
class Row:
    """A setting's medians over the turns.

    Attributes:
        name: the setting.
        samples_per_second: of all processes together.
        tokens_per_second: real tokens of all processes together.
        tflops: of one process, from the operations that the mathematics needs.
        peak_gib: most memory that tensors took on the first GPU.
        reserved_gib: most memory that the allocator held there.
        spread: (largest - smallest) / median of the turns' times.
    """

    name: str
    samples_per_second: float
    tokens_per_second: float
    tflops: float
    peak_gib: float | None
    reserved_gib: float | None
    spread: float

    @property
    def roofline_share(self) -> float:
        """Share of the rate of matrix products that is reached."""
        return self.tflops / ROOFLINE_TFLOPS


def row_of(name: str, turns: Sequence[Mapping[str, Any]]) -> Row:
    """The medians of what `measure` returned in several turns."""
    times = [turn["seconds"] for turn in turns]
    seconds, last = median(times), turns[-1]
    return Row(
        name=name,
        samples_per_second=last["samples"] / seconds,
        tokens_per_second=last["tokens"] / seconds,
        tflops=last["flops"] / seconds / 1e12,
        peak_gib=last["peak_gib"],
        reserved_gib=last["reserved_gib"],
        spread=(max(times) - min(times)) / seconds,
    )


def table_of(title: str, rows: Sequence[Row]) -> Table:
    """A table of settings."""
    table = Table(title=title)
    table.add_column("setting", no_wrap=True)
    for heading in ("samples/s", "tokens/s", "TFLOP/s", "roofline", "peak GiB", "reserved GiB", "spread"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.name,
            f"{row.samples_per_second:.1f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.tflops:.1f}",
            f"{row.roofline_share:.1%}",
            *("" if value is None else f"{value:.1f}" for value in (row.peak_gib, row.reserved_gib)),
            f"{row.spread:.1%}",
        )
    return table


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def profile_tables(name: str, profile: Mapping[str, Any], longest: int = 25) -> list[Table]:
    """Where a step's time goes: by kind of kernel, with the rest that no kernel runs, and the longest kernels."""
    kernels: dict[str, list[float]] = profile["kernels"]
    total = profile["milliseconds"]
    by_kind: dict[str, float] = {}
    for kernel, (spent, _) in kernels.items():
        by_kind[kind_of(kernel)] = by_kind.get(kind_of(kernel), 0.0) + spent
    by_kind["no kernel running"] = total - sum(by_kind.values())
    kinds = Table("what", "ms", "share", title=f"{name}: {total:.1f} ms a step (while profiled)")
    for kind, spent in sorted(by_kind.items(), key=lambda item: -item[1]):
        kinds.add_row(kind, f"{spent:.2f}", f"{spent / total:.1%}")
    top = Table("kernel", "kind", "times a step", "ms a step", title=f"{name}: longest kernels")
    for kernel, (spent, count) in sorted(kernels.items(), key=lambda item: -item[1][0])[:longest]:
        top.add_row(kernel[:110], kind_of(kernel), f"{count:.0f}", f"{spent:.3f}")
    return [kinds, top]
