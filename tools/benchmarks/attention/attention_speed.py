"""Time and memory of attention, forward and backward, beside what PyTorch offers for the same; see README.md."""

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from model_center.layer.attention_kernels import Packing, Scoring, attend, attend_packed, attend_reference
from model_center.layer.attention_mask import AttentionMask, ScoreMask
from model_center.layer.position import dense_bias


@dataclass(frozen=True)
class Shape:
    """What is attended: (batch, length, heads, dim)."""

    batch: int
    heads: int
    length: int
    dim: int

    @property
    def flops(self) -> int:
        """Operations of the two matrix products of the forward pass and the five of the backward pass."""
        return 7 * 2 * self.batch * self.heads * self.length**2 * self.dim


SHAPES = {
    "t5-base": Shape(64, 12, 512, 64),
    "t5-large": Shape(64, 16, 512, 64),
    "t5-3b": Shape(16, 32, 512, 128),
    "t5-11b": Shape(8, 128, 512, 128),
    "cpm-1": Shape(32, 32, 512, 80),
}
Run = Callable[[], tuple[Tensor, list[Tensor]]]
"""Returns the output and what its gradient is wanted of."""


class Case:
    """Inputs of one shape, the same for all ways to attend."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.shape = shape
        self.scale = 1 / math.sqrt(shape.dim)
        torch.manual_seed(0)
        sizes = (shape.batch, shape.length, shape.heads, shape.dim)
        device = torch.device("cuda")
        # As projections leave them: heads are neighbours in memory.
        self.query, self.key, self.value = (
            torch.randn(sizes, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for _ in range(3)
        )
        self.inputs = [self.query, self.key, self.value]
        self.bias = torch.randn(shape.heads, 2 * shape.length - 1, device=device, requires_grad=True)
        self.lengths = torch.randint(1, shape.length + 1, (shape.batch,))
        self.lengths[0] = shape.length
        self.key_lengths = self.lengths.to(device)
        cumulative = F.pad(self.lengths.cumsum(0), (1, 0)).to(device, torch.int32)
        self.packing = Packing(cumulative=cumulative, longest=shape.length)
        tokens = int(self.lengths.sum())
        self.packed = [
            torch.randn(tokens, *sizes[2:], dtype=dtype, device=device, requires_grad=True) for _ in range(3)
        ]
        self.device = device

    def ours(self, mask: AttentionMask | None = None, dropout_p: float = 0.0, biased: bool = True) -> Run:
        """Our attention, choosing for itself."""
        resolved = (mask or AttentionMask()).resolve(self.shape.length, self.shape.length, self.device)
        scoring = Scoring(bias=self.bias if biased else None, scale=self.scale, dropout_p=dropout_p)
        learnt = [*self.inputs, *([self.bias] if biased else [])]
        return lambda: (attend(self.query, self.key, self.value, resolved, scoring)[0], learnt)

    def eager(self) -> Run:
        """Everything written out."""
        scoring = Scoring(bias=self.bias, scale=self.scale)

        def run() -> tuple[Tensor, list[Tensor]]:
            output = attend_reference(self.query, self.key, self.value, ScoreMask(), scoring)[0]
            return output, [*self.inputs, self.bias]

        return run

    def sdpa(self, mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False) -> Run:
        """PyTorch's fused attention, whichever kernel it takes."""
        options = partial(F.scaled_dot_product_attention, scale=self.scale, dropout_p=dropout_p, is_causal=is_causal)
        return lambda: (options(self.query, self.key, self.value, mask), self.inputs)

    def sdpa_with_bias(self) -> Run:
        """PyTorch's fused attention with a learnt bias, which excludes its flash kernel."""

        def run() -> tuple[Tensor, list[Tensor]]:
            bias = dense_bias(self.bias, self.shape.length).to(self.query.dtype)[None]
            output = F.scaled_dot_product_attention(self.query, self.key, self.value, bias, scale=self.scale)
            return output, [*self.inputs, self.bias]

        return run

    def flex(self) -> Run:
        """FlexAttention reading a dense bias."""
        compiled = torch.compile(flex_attention, dynamic=False)

        def run() -> tuple[Tensor, list[Tensor]]:
            dense = dense_bias(self.bias, self.shape.length).contiguous()

            def add(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return score + dense[head, query, key]

            output = compiled(self.query, self.key, self.value, score_mod=add, scale=self.scale)
            assert isinstance(output, Tensor)
            return output, [*self.inputs, self.bias]

        return run

    def ours_packed(self, biased: bool, dropout_p: float = 0.0) -> Run:
        """Our attention over sequences without padding."""
        scoring = Scoring(bias=self.bias if biased else None, scale=self.scale, dropout_p=dropout_p)
        query, key, value = self.packed
        learnt = [*self.packed, *([self.bias] if biased else [])]
        return lambda: (attend_packed(query, key, value, self.packing, scoring), learnt)

    def varlen(self) -> Run:
        """PyTorch's attention over sequences without padding."""
        query, key, value = self.packed
        limits = (self.packing.cumulative, self.packing.cumulative, self.packing.longest, self.packing.longest)

        def run() -> tuple[Tensor, list[Tensor]]:
            output = varlen_attn(query, key, value, *limits, scale=self.scale)
            assert isinstance(output, Tensor)
            return output, self.packed

        return run

    def runs(self) -> dict[str, Run]:
        """All that is compared, by what the table calls it."""
        causal, padded = AttentionMask(causal=True), AttentionMask(lengths=self.key_lengths)
        positions = torch.arange(self.shape.length, device=self.device)
        real = (positions < self.key_lengths[:, None])[:, None, None]
        context = AttentionMask(context=(positions < self.shape.length // 2)[None])
        return {
            "relative bias, ours": self.ours(),
            "relative bias, eager": self.eager(),
            "relative bias, SDPA": self.sdpa_with_bias(),
            "relative bias, FlexAttention": self.flex(),
            "no bias, SDPA": self.sdpa(),
            "causal relative bias, ours": self.ours(causal),
            "causal relative bias and context, ours": self.ours(context),
            "causal, SDPA": self.sdpa(is_causal=True),
            "relative bias and lengths, ours": self.ours(padded),
            "lengths as a mask, SDPA": self.sdpa(real),
            "relative bias and dropout, ours": self.ours(dropout_p=0.1),
            "dropout, SDPA": self.sdpa(dropout_p=0.1),
            "packed relative bias, ours": self.ours_packed(biased=True),
            "packed, ours": self.ours_packed(biased=False),
            "packed and dropout, ours": self.ours_packed(biased=False, dropout_p=0.1),
            "packed, varlen_attn": self.varlen(),
        }


def milliseconds(run: Run, calls: int) -> float:
    """Time of one forward and backward pass on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        output, learnt = run()
        torch.autograd.grad(output, learnt, output.detach())
    end.record()
    torch.cuda.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return elapsed / calls


def peak_mib(run: Run) -> float:
    """Memory that one forward and backward pass needs beside its inputs."""
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output, learnt = run()
    torch.autograd.grad(output, learnt, output.detach())
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def compare(name: str, dtype: torch.dtype, rounds: int, only: str) -> None:
    """Print a table for one shape."""
    shape = SHAPES[name]
    runs = {title: run for title, run in Case(shape, dtype).runs().items() if only in title}
    memory: dict[str, float] = {}
    for title, run in list(runs.items()):
        try:
            milliseconds(run, 2)
            memory[title] = peak_mib(run)
        except (RuntimeError, NotImplementedError) as error:
            print(f"{title}: {str(error).splitlines()[0]}")
            del runs[title]
    times: dict[str, list[float]] = {title: [] for title in runs}
    for _ in range(rounds):
        for title, run in runs.items():
            times[title].append(milliseconds(run, 5))
    size = f"{shape.batch} × {shape.heads} heads × {shape.length} × {shape.dim}, {str(dtype).removeprefix('torch.')}"
    print(f"\n| {name}: {size} | ms | TFLOP/s | peak MiB |\n| --- | --- | --- | --- |")
    for title, measured in times.items():
        median = statistics.median(measured)
        print(f"| {title} | {median:.3f} | {shape.flops / median / 1e9:.0f} | {memory[title]:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), help=f"of {', '.join(SHAPES)}; by default all")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=11, help="how often each is measured, in turn")
    parser.add_argument("--only", default="", help="rows whose names contain this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    run = partial(compare, dtype=getattr(torch, arguments.dtype), rounds=arguments.rounds, only=arguments.only)
    for name in arguments.shapes:
        run(name)


if __name__ == "__main__":
    main()
