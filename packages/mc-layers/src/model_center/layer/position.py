"""Position information for attention: learnt relative biases and rotations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.engine import HALF, Normal
from model_center.layer.checks import check_positive
from model_center.layer.module import Module


class RelativePositionEmbedding(Module):
    """A learnt score bias for each attention head and each bucket of distances (Raffel et al. 2020, T5).

    Near distances have a bucket each, farther ones share logarithmically growing buckets, and everything from
    `max_distance` on falls into the last one.

    Args:
        num_heads: Heads of the attention that uses the bias.
        num_buckets: Number of buckets; split between keys before and after the query when `bidirectional`.
        max_distance: Distance from which all are alike.
        bidirectional: Tell keys after the query from those before it; otherwise those after count as distance 0.
        dtype: Type of the parameter.
        init_mean: Mean of the normal distribution that `relative_attention_bias`, of shape (num_buckets, num_heads),
            starts from.
        init_std: Its standard deviation.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = False,
        dtype: torch.dtype = HALF,
        init_mean: float = 0.0,
        init_std: float = 1.0,
    ) -> None:
        check_positive(num_heads=num_heads, num_buckets=num_buckets, max_distance=max_distance)
        one_side = num_buckets // 2 if bidirectional else num_buckets
        if one_side < 2 or max_distance <= one_side // 2:
            raise ValueError(
                f"`max_distance` must be greater than the number of exact buckets, and there must be at least one, "
                f"but `num_buckets` is {num_buckets}, `max_distance` {max_distance}, `bidirectional` {bidirectional}"
            )
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.relative_attention_bias = self.parameter(
            num_buckets, num_heads, dtype=dtype, init=Normal(init_mean, init_std)
        )

    def forward(self, query_len: int, key_len: int, query_offset: int = 0) -> Tensor:
        """Return the bias of every head, query and key.

        Args:
            query_len: Number of queries.
            key_len: Number of keys.
            query_offset: *Added.* Position of the first query among the keys, for cached decoding.

        Returns:
            Tensor of shape (num_heads, query_len, key_len).
        """
        by_distance = self.by_distance(query_len, key_len, query_offset)
        return dense_bias(by_distance, key_len).to(self.relative_attention_bias.dtype)

    def by_distance(self, query_len: int, key_len: int, query_offset: int = 0) -> Tensor:
        """Return the bias of every head and distance: all that `forward` returns, each value once.

        Attention takes it in place of the dense bias, and its fast kernels need no more.

        Args:
            query_len: Number of queries.
            key_len: Number of keys.
            query_offset: Position of the first query among the keys, for cached decoding.

        Returns:
            Tensor of shape (num_heads, query_len + key_len - 1), float32 at least; query q and key k find theirs in
            column k - q + query_len - 1.
        """
        check_positive(query_len=query_len, key_len=key_len)
        # The gradients of all layers add up here, so half precision would lose the small ones.
        table = self.relative_attention_bias.to(torch.promote_types(self.relative_attention_bias.dtype, torch.float32))
        first = -(query_offset + query_len - 1)
        distances = torch.arange(first, first + query_len + key_len - 1, device=table.device)
        return F.embedding(self.buckets(distances), table).t().contiguous()

    def buckets(self, distances: Tensor) -> Tensor:
        """Map distances (key position minus query position, integers of any shape) to bucket numbers."""
        num_buckets = self.num_buckets
        offset: Tensor | int = 0
        if self.bidirectional:
            num_buckets //= 2
            offset = (distances > 0) * num_buckets
            distances = distances.abs()
        else:
            distances = (-distances).clamp(min=0)
        exact = num_buckets // 2
        growth = torch.log(distances.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        shared = (exact + (growth * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
        return offset + torch.where(distances < exact, distances, shared)


def dense_bias(by_distance: Tensor, key_len: int) -> Tensor:
    """Write out `by_distance`, (num_heads, query_len + key_len - 1), as (num_heads, query_len, key_len)."""
    return by_distance.unfold(1, key_len, 1).flip(1)


@dataclass(frozen=True, eq=False)
class RotaryPositions:
    """Rotations for the positions at hand, computed once and shared by all layers; see `RotaryEmbedding.positions`.

    Attributes:
        cos: Cosines, shape (…, len, rotary_dim), each value twice in a row.
        sin: Sines, likewise.
    """

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate the first `rotary_dim` elements of each vector of `x`, shape (…, len, dim_head), pair by pair."""
        rotary_dim = self.cos.shape[-1]
        if rotary_dim > x.shape[-1]:
            raise ValueError(f"`rotary_dim` must be at most `dim_head` ({x.shape[-1]}), but is {rotary_dim}")
        turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
        # (a, b) becomes (a·cos − b·sin, b·cos + a·sin) for each pair of neighbours.
        partner = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
        turned = (turned * self.cos + partner * self.sin).to(x.dtype)
        return torch.cat((turned, kept), dim=-1)


class RotaryEmbedding(torch.nn.Module):
    """Rotate pairs of neighbouring elements (2i, 2i+1) by an angle that grows with the position (Su et al. 2021).

    The interleaved form of GPT-J. It has no parameters.

    Args:
        rotary_dim: How many elements of each head are rotated, from the first on; even.
    """

    def __init__(self, rotary_dim: int) -> None:
        super().__init__()
        check_positive(rotary_dim=rotary_dim)
        if rotary_dim % 2:
            raise ValueError(f"`rotary_dim` must be even, but is {rotary_dim}")
        self.rotary_dim = rotary_dim

    def forward(self, h_q: Tensor, h_k: Tensor, query_offset: int = 0) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys.

        Args:
            h_q: Shape (batch·num_heads, len_q, dim_head), or any (…, len_q, dim_head).
            h_k: Shape (batch·num_heads, len_k, dim_head), or any (…, len_k, dim_head).
            query_offset: *Added.* Position of the first query and of the first key. For positions that don't count
                up, as with padding on the left, use `positions`.

        Returns:
            Both, rotated, in their shapes.
        """

        def rotate(h: Tensor) -> Tensor:
            counted = torch.arange(query_offset, query_offset + h.shape[-2], device=h.device)
            return self.positions(counted, h.dtype).rotate(h)

        return rotate(h_q), rotate(h_k)

    def positions(self, position_ids: Tensor, dtype: torch.dtype = torch.float32) -> RotaryPositions:
        """Compute the rotations of given positions once; every layer's attention takes them as its position bias.

        Args:
            position_ids: Integers of shape (len,) or (batch, len).
            dtype: Type of what is to be rotated; angles are computed in float32 at least.

        Returns:
            Rotations for tensors of shape (batch, num_heads, len, dim_head).
        """
        dtype = torch.promote_types(dtype, torch.float32)
        exponents = torch.arange(0, self.rotary_dim, 2, device=position_ids.device, dtype=dtype) / self.rotary_dim
        angles = position_ids[..., None] * 10000.0**-exponents
        if position_ids.dim() == 2:
            angles = angles[:, None]
        angles = angles.repeat_interleave(2, dim=-1)
        return RotaryPositions(angles.cos(), angles.sin())
