"""The Triton kernels of attention as PyTorch operations, with gradients, for eager and compiled models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from model_center.layer.kernels.backward import delta_kernel, key_value_kernel, query_kernel
from model_center.layer.kernels.bias_gradient import diagonal_kernel, tile_bias_kernel
from model_center.layer.kernels.forward import forward_kernel
from model_center.layer.kernels.tiles import KEYS_ALL, KEYS_BY_GROUP, KEYS_BY_MASK, MARGIN

_Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Tiles:
    """How a kernel divides its work: queries and keys in a tile, warps for each program, loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """What a kernel takes when it is started."""
        return {"TILE_Q": self.queries, "TILE_K": self.keys, "num_warps": self.warps, "num_stages": self.stages}

    @property
    def square_options(self) -> dict[str, int]:
        """The same for a kernel of as many queries as keys in a tile."""
        return {"TILE": self.queries, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Plan:
    """Tiles of all kernels for one size of head."""

    forward: Tiles
    key_value: Tiles
    query: Tiles
    bias: Tiles


PLANS: dict[int, Plan] = {
    64: Plan(Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)),
    128: Plan(Tiles(64, 64, 4, 3), Tiles(32, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(128, 128, 16, 1)),
}
"""By the smallest power of two, 64 at least, that holds a head: the fastest of 21 to 22 candidates on one H200, at the
shapes of T5-3B (128) and T5-large (64) with a learnt bias."""


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    groups: Tensor | None = None,
    group_bounds: Tensor | None = None,
    cumulative: Tensor | None = None,
    longest: int = 0,
    is_causal: bool = False,
    scale: float = 1.0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Compute attention without ever holding a (queries, keys) tensor, and its bit-repeatable gradients.

    Args:
        query: Shape (batch, len_q, num_heads, dim_head), float16 or bfloat16; packed, (1, tokens, num_heads, dim_head).
        key: Shape (batch, len_k, num_heads_kv, dim_head), where num_heads_kv divides num_heads.
        value: Shape of `key`.
        bias: Added to the scaled products; shape (num_heads, len_q + len_k - 1), float32, where column
            k - q + len_q - 1 concerns query q and key k. Packed, `longest` takes the place of both lengths.
        key_lengths: Integers of shape (batch or 1,), how many keys may be attended.
        key_mask: Boolean of shape (batch or 1, len_k), True where a key may be attended. Excludes `groups`.
        groups: int32 of shape (batch or 1, len_q), where len_q = len_k: twice the number of the group that a position
            belongs to, which attends its own group only, plus 1 if it is context: with `is_causal`, context is seen
            by its whole group and sees context only.
        group_bounds: What `bounds_of_groups` says of `groups`; both are given or neither.
        cumulative: int32 of shape (sequences + 1,), where packed sequences begin and end.
        longest: Length of the longest packed sequence, or more.
        is_causal: Query i sees keys 0 to i.
        scale: Factor of the products.
        dropout_p: Probability of dropping a probability.

    Returns:
        Shape of `query`; zeros where a query may attend nothing.
    """
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(0x7FFFFFFF, (1,), dtype=torch.int32, device=query.device)
    assert (groups is None) == (group_bounds is None)
    # The kernels take no strides of these: a single row, or a column of a tensor, must be written out.
    lengths = None if key_lengths is None else key_lengths.expand(query.shape[0]).contiguous()
    bounds = None if group_bounds is None else group_bounds.expand(query.shape[0], -1).contiguous()
    masks = (lengths, key_mask, groups, bounds, cumulative, seed)
    output: Tensor = _attention(query, key, value, bias, *masks, longest, is_causal, scale, dropout_p)[0]
    return output


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_lengths, Tensor? key_mask, Tensor? groups, "
    "Tensor? bounds, Tensor? cumulative, Tensor? seed, SymInt longest, bool is_causal, float scale, float dropout_p"
)
"""What `KernelCall` takes, as both operators pass it on."""
_NAMES = [declared.split()[-1] for declared in _ARGUMENTS.split(", ")]


def _packing(*arguments: Any) -> tuple[Any, Any]:
    """Return `cumulative` and `longest` of what `_ARGUMENTS` declares; more may follow."""
    named = dict(zip(_NAMES, arguments, strict=False))
    return named["cumulative"], named["longest"]


@torch.library.custom_op("model_center::attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)")
def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the output and, for each sequence, head and query, the logarithm of the sum of exponentials."""
    return KernelCall(*arguments).forward()


@torch.library.custom_op(
    "model_center::attention_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor output, Tensor log_sum, {_ARGUMENTS}, bool learns_bias) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(gradient: Tensor, output: Tensor, log_sum: Tensor, *others: Any) -> _Gradients:
    """Return the gradients of queries, keys, values and bias (empty if that is not wanted)."""
    *arguments, learns_bias = others
    call = KernelCall(*arguments)
    gradient = _with_whole_heads(gradient)
    known = (gradient, log_sum, call.delta(output, gradient))
    key_gradient, value_gradient = call.key_value_gradients(*known)
    bias_gradient = call.bias_gradient(*known) if learns_bias else gradient.new_empty(0)
    return call.query_gradient(*known), key_gradient, value_gradient, bias_gradient


@_attention.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    cumulative, longest = _packing(query, *others)
    sequences, len_q = (query.shape[0], query.shape[1]) if cumulative is None else (cumulative.shape[0] - 1, longest)
    log_sum = query.new_empty(sequences, query.shape[2], len_q, dtype=torch.float32)
    return query.new_empty(query.shape), log_sum


@_attention_backward.register_fake
def _(gradient: Tensor, output: Tensor, log_sum: Tensor, *others: Any) -> _Gradients:  # noqa: ARG001
    query, key, value, bias = others[:4]
    learnt = bias if others[-1] else None
    bias_gradient = gradient.new_empty(0) if learnt is None else learnt.new_empty(learnt.shape)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), bias_gradient


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest, ctx.is_causal, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    learns_bias = ctx.needs_input_grad[3]
    *gradients, bias_gradient = _attention_backward(
        gradient, *ctx.saved_tensors, ctx.longest, ctx.is_causal, ctx.scale, ctx.dropout_p, learns_bias
    )
    return (*gradients, bias_gradient if learns_bias else None, *[None] * 10)


_attention.register_autograd(_backward, setup_context=_keep_for_backward)


# By these PyTorch's counter of operations, and the compiler where it chooses what to compute again, know the cost.
@register_flop_formula(torch.ops.model_center.attention)
def _(*arguments: Any, **_: Any) -> int:
    return 2 * _operations_of_a_product(*arguments)


@register_flop_formula(torch.ops.model_center.attention_backward)
def _(gradient: Any, output: Any, log_sum: Any, *arguments: Any, **_: Any) -> int:  # noqa: ARG001
    return 5 * _operations_of_a_product(*arguments)


def _operations_of_a_product(query: torch.Size, key: torch.Size, *others: Any) -> int:
    """Count one product for every pair of a query and a key, as PyTorch does: also pairs that are masked.

    Packed sequences count as if each were the longest one, since a shape does not tell how long they are.
    """
    cumulative, longest = _packing(query, key, *others)
    keys: int = key[1] if cumulative is None else longest
    return 2 * query.numel() * keys


class KernelCall:
    """One call of the kernels: their arguments in the order in which all of them take them."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        key_lengths: Tensor | None,
        key_mask: Tensor | None,
        groups: Tensor | None,
        bounds: Tensor | None,
        cumulative: Tensor | None,
        seed: Tensor | None,
        longest: int,
        is_causal: bool,
        scale: float,
        dropout_p: float,
    ) -> None:
        self.sequences, self.len_q, self.heads, self.dim = query.shape
        self.len_k, self.heads_kv = key.shape[1:3]
        if cumulative is not None:
            self.sequences, self.len_q, self.len_k = cumulative.shape[0] - 1, longest, longest
        self.dim_tile = max(min(PLANS), triton.next_power_of_2(self.dim))
        self.plan = PLANS[self.dim_tile]
        self.is_packed, self.has_bias = cumulative is not None, bias is not None
        query, key, value = (_with_whole_heads(x) for x in (query, key, value))
        self.tensors = (query, key, value)
        # A kernel that is compiled without an argument does not look at what stands in its place.
        self.bias = query if bias is None else F.pad(bias, (MARGIN.value, MARGIN.value))
        mask = groups if key_mask is None else key_mask.view(torch.uint8)
        self.selectors = tuple(query if x is None else x for x in (key_lengths, mask, bounds, cumulative, seed))
        self.cumulative = query if cumulative is None else cumulative
        mask_strides = (0, 0) if mask is None else mask.expand(self.sequences, -1).stride()
        self.more_strides = (self.bias.stride(0), *mask_strides)
        self.factors = (scale, dropout_p)
        keys = KEYS_BY_MASK if key_mask is not None else KEYS_ALL if groups is None else KEYS_BY_GROUP
        self.skips_later_keys = is_causal and groups is None
        self.is_even = key_lengths is None and mask is None and cumulative is None
        self.constants = {
            "GROUP": self.heads // self.heads_kv,
            "DIM": self.dim,
            "DIM_TILE": self.dim_tile,
            "LENGTHS": key_lengths is not None,
            "KEYS": keys.value,
            "PACKED": self.is_packed,
            "IS_CAUSAL": is_causal,
            "DROPS": dropout_p > 0.0,
        }

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the output and the logarithms of the sums of exponentials."""
        output, log_sum, tiles = _empty_like(self.tensors[0]), self._per_query(), self.plan.forward
        forward_kernel[(triton.cdiv(self.len_q, tiles.queries), self.sequences * self.heads)](
            *self.tensors,
            self.bias,
            *self.selectors,
            output,
            log_sum,
            *_strides(*self.tensors, output),
            *self.more_strides,
            self.len_q,
            self.len_k,
            self.heads,
            *self.factors,
            **self.constants,
            HAS_BIAS=self.has_bias,
            **tiles.options,
        )
        return output, log_sum

    def delta(self, output: Tensor, gradient: Tensor) -> Tensor:
        """Return the products of outputs and their gradients, summed over each head's elements."""
        delta, tile = self._per_query(), 64
        delta_kernel[(triton.cdiv(self.len_q, tile), self.sequences * self.heads)](
            output,
            gradient,
            delta,
            self.cumulative,
            *_strides(output, gradient),
            self.len_q,
            self.heads,
            DIM=self.dim,
            DIM_TILE=self.dim_tile,
            TILE_Q=tile,
            PACKED=self.is_packed,
        )
        return delta

    def key_value_gradients(self, gradient: Tensor, log_sum: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of keys and values."""
        key_gradient, value_gradient = _empty_like(self.tensors[1]), _empty_like(self.tensors[2])
        tiles = self.plan.key_value
        key_value_kernel[(triton.cdiv(self.len_k, tiles.keys), self.sequences * self.heads_kv)](
            *self.tensors,
            gradient,
            self.bias,
            *self.selectors,
            log_sum,
            delta,
            key_gradient,
            value_gradient,
            *_strides(*self.tensors, gradient, key_gradient),
            *self.more_strides,
            self.len_q,
            self.len_k,
            self.heads_kv,
            *self.factors,
            **self.constants,
            HAS_BIAS=self.has_bias,
            EVEN_Q=not self.is_packed and self.len_q % tiles.queries == 0,
            **tiles.options,
        )
        return key_gradient, value_gradient

    def query_gradient(self, gradient: Tensor, log_sum: Tensor, delta: Tensor) -> Tensor:
        """Return the gradient of queries."""
        query_gradient, tiles = _empty_like(self.tensors[0]), self.plan.query
        query_kernel[(triton.cdiv(self.len_q, tiles.queries), self.sequences * self.heads)](
            *self.tensors,
            gradient,
            self.bias,
            *self.selectors,
            log_sum,
            delta,
            query_gradient,
            *_strides(*self.tensors, gradient, query_gradient),
            *self.more_strides,
            self.len_q,
            self.len_k,
            self.heads,
            *self.factors,
            **self.constants,
            HAS_BIAS=self.has_bias,
            **tiles.options,
        )
        return query_gradient

    def bias_gradient(self, gradient: Tensor, log_sum: Tensor, delta: Tensor) -> Tensor:
        """Return the gradient of the bias, (num_heads, len_q + len_k - 1)."""
        tiles, device = self.plan.bias, gradient.device
        tile = tiles.queries
        tiles_q, tiles_k = triton.cdiv(self.len_q, tile), triton.cdiv(self.len_k, tile)
        # Few heads and short sequences would leave multiprocessors idle.
        splits = max(1, min(self.sequences, 512 // (tiles_q * tiles_k * self.heads)))
        sums = torch.empty(splits, self.heads, tiles_q, tiles_k, 2, tile, dtype=torch.float32, device=device)
        tile_bias_kernel[(tiles_q * tiles_k, self.heads, splits)](
            *self.tensors,
            gradient,
            self.bias,
            *self.selectors,
            log_sum,
            delta,
            sums,
            *_strides(*self.tensors, gradient),
            *self.more_strides,
            self.sequences,
            self.len_q,
            self.len_k,
            self.heads,
            tiles_k,
            *self.factors,
            **self.constants,
            EVEN=self.is_even and self.len_q % tile == 0 and self.len_k % tile == 0,
            **tiles.square_options,
        )
        result = torch.empty(self.heads, self.len_q + self.len_k - 1, dtype=torch.float32, device=device)
        diagonal_kernel[(tiles_q + tiles_k, self.heads)](
            sums,
            result,
            splits,
            self.heads,
            self.len_q,
            self.len_k,
            tiles_q,
            tiles_k,
            TILE=tile,
            IS_CAUSAL=self.skips_later_keys,
        )
        return result

    def _per_query(self) -> Tensor:
        """Room for a number for each sequence, head and query."""
        return torch.empty(self.sequences, self.heads, self.len_q, dtype=torch.float32, device=self.tensors[0].device)


def _with_whole_heads(x: Tensor) -> Tensor:
    """Make the elements of each head neighbours, as the kernels expect them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])
