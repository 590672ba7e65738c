"""Multi-head attention with its projections."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from types import NoneType

from torch import Tensor

from model_center.layer.attention_kernels import Packing, Scoring, attend, attend_packed
from model_center.layer.attention_mask import AttentionMask, ScoreMask, resolve_mask
from model_center.layer.cache import CrossAttentionCache, SelfAttentionCache
from model_center.layer.checks import check_choice, check_last_dim, check_positive, check_probability
from model_center.layer.linear import Linear
from model_center.layer.module import Module
from model_center.layer.options import DropoutOptions, PositionOptions, PrecisionOptions, ScaleOptions, select
from model_center.layer.position import RotaryEmbedding, RotaryPositions

Mask = AttentionMask | ScoreMask | Tensor
"""What a mask may be, besides None."""
PositionBias = Tensor | RotaryEmbedding | RotaryPositions
"""What a position bias may be, besides None: a tensor with `relative`, the others with `rotary` positions."""

_POSITION_BIASES: dict[str, tuple[tuple[type, ...], str]] = {
    "none": ((NoneType,), "None"),
    "relative": ((Tensor, NoneType), "a tensor or None"),
    "rotary": ((RotaryEmbedding, RotaryPositions), "a RotaryEmbedding or its positions(…)"),
}


@dataclass(eq=False, repr=False)
class Attention(PositionOptions, DropoutOptions, ScaleOptions, PrecisionOptions, Module):
    """Project to queries, keys and values, attend, project back (Vaswani et al. 2017).

    `dropout_p` concerns the attention probabilities; what happens to the output is the enclosing block's matter.

    Args:
        dim_in: Size of the last dimension of `query` and `key_value`.
        dim_head: Size of each head.
        num_heads: Number of heads of the queries.
        dim_out: Size of the output's last dimension; None means `dim_in`.
        init_mean: Mean of the normal distribution that weights start from.
        init_std: Its standard deviation.
        bias: Whether the four projections have a bias.
        mask_value: Score of masked positions before the softmax; after it they have no weight in any case, so only
            a value so small that unmasked scores come near it makes a difference.
        pos_bias_type: `none`, `relative` (a tensor added to the scores) or `rotary`.
        attn_scale: Divide scores by the square root of `dim_head`.
        dtype: Type of the parameters.
        int8: *Added.* Store weights in 8 bits, for inference.
        length_scale: *Added.* Divide products of the projections by the square root of their input dimension.
        dropout_p: *Added.* Probability of dropping an attention probability in training.
        num_heads_kv: *Added.* Number of heads of keys and values, a divisor of `num_heads`; None means `num_heads`.
    """

    dim_in: int
    dim_head: int
    num_heads: int
    dim_out: int | None = None
    _: KW_ONLY
    init_mean: float = 0.0
    init_std: float = 0.02
    bias: bool = False
    mask_value: float = float("-inf")

    def __post_init__(self) -> None:
        heads_kv = self.num_heads if self.num_heads_kv is None else self.num_heads_kv
        check_positive(dim_in=self.dim_in, dim_head=self.dim_head, num_heads=self.num_heads, num_heads_kv=heads_kv)
        check_probability(dropout_p=self.dropout_p)
        check_choice("pos_bias_type", self.pos_bias_type, _POSITION_BIASES)
        if self.num_heads % heads_kv:
            raise ValueError(f"`num_heads` must be a multiple of `num_heads_kv` ({heads_kv}), but is {self.num_heads}")
        inner, inner_kv = self.num_heads * self.dim_head, heads_kv * self.dim_head
        dim_out = self.dim_in if self.dim_out is None else self.dim_out
        self.project_q = Linear(**select(Linear, self, dim_out=inner))
        self.project_k = Linear(**select(Linear, self, dim_out=inner_kv))
        self.project_v = Linear(**select(Linear, self, dim_out=inner_kv))
        self.attention_out = Linear(**select(Linear, self, dim_in=inner, dim_out=dim_out))

    def forward(
        self,
        query: Tensor,
        key_value: Tensor | None,
        mask: Mask | Packing | None,
        position_bias: PositionBias | None = None,
        head_mask: Tensor | None = None,
        cache: SelfAttentionCache | CrossAttentionCache | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Let each position of `query` attend the positions of `key_value`.

        Args:
            query: Shape (batch, len_q, dim_in).
            key_value: Shape (batch, len_k, dim_in). May be None when `cache` already holds cross-attention's keys.
            mask: An `AttentionMask`, or the documented tensor of shape (batch, len_q, len_k), True (or 1) where
                attention is allowed, or None if nothing is masked. With a cache, len_k counts cached positions too. A
                `Packing` for one row (1, tokens, dim_in) of sequences, which attend themselves.
            position_bias: With `pos_bias_type="relative"` a tensor of shape (num_heads, len_q, len_k) or
                (1 or batch, num_heads, len_q, len_k), or None. (The document prints the latter with len_k and len_q
                exchanged.) Faster: `RelativePositionEmbedding.by_distance`, (num_heads, len_q + len_k - 1). With
                `rotary` a `RotaryEmbedding`, or its `positions(…)`.
            head_mask: *Added.* Factor of each head, shape (num_heads,).
            cache: *Added.* Earlier keys and values; new ones are stored in it.
            output_attentions: *Added.* Return the attention probabilities as well.

        Returns:
            Shape (batch, len_q, dim_out); with `output_attentions` also the probabilities, shape
            (batch, num_heads, len_q, len_k), dropped and masked as they were used.
        """
        batch, len_q = self._check_inputs(query, key_value, position_bias, head_mask)
        query_offset = cache.length if isinstance(cache, SelfAttentionCache) else 0
        h_q, h_k, h_v = self._project(query, key_value, position_bias, query_offset, cache)
        len_k = h_k.shape[2]
        if isinstance(mask, Packing):
            len_q = len_k = mask.longest
        bias = position_bias if isinstance(position_bias, Tensor) else None
        dense, by_distance = (self.num_heads, len_q, len_k), (self.num_heads, len_q + len_k - 1)
        if bias is not None and tuple(bias.shape) not in (dense, (1, *dense), (batch, *dense), by_distance):
            raise ValueError(
                f"`position_bias` must have shape (num_heads, len_q, len_k) = {dense}, or that with 1 or the batch "
                f"size ({batch}) in front, or (num_heads, len_q + len_k - 1) = {by_distance}, "
                f"but has {tuple(bias.shape)}"
            )
        scoring = Scoring(
            bias=bias,
            scale=1 / math.sqrt(self.dim_head) if self.attn_scale else 1.0,
            mask_value=self.mask_value,
            dropout_p=self.dropout_p if self.training else 0.0,
        )
        if isinstance(mask, Packing):
            if batch != 1 or head_mask is not None or cache is not None or output_attentions:
                raise ValueError(
                    "with a Packing as `mask`, `query` must have shape (1, tokens, dim_in), and `head_mask`, `cache` "
                    f"and `output_attentions` must not be given; the shape of `query` is {tuple(query.shape)}"
                )
            q, k, v = (x[0].transpose(0, 1) for x in (h_q, h_k, h_v))
            packed = attend_packed(q, k, v, mask, scoring)
            row: Tensor = self.attention_out(packed.flatten(1)[None])
            return row
        mask = resolve_mask(mask, batch=batch, len_q=len_q, len_k=len_k, query_offset=query_offset, device=query.device)
        output, probabilities = attend(h_q, h_k, h_v, mask, scoring, output_attentions)
        if head_mask is not None:
            # A factor of a head's probabilities is a factor of its output.
            factor = head_mask.to(output.dtype)[:, None, None]
            output = output * factor
            probabilities = None if probabilities is None else probabilities * factor
        hidden_states: Tensor = self.attention_out(output.transpose(1, 2).flatten(2))
        return hidden_states if probabilities is None else (hidden_states, probabilities)

    def _project(
        self,
        query: Tensor,
        key_value: Tensor | None,
        position_bias: PositionBias | None,
        query_offset: int,
        cache: SelfAttentionCache | CrossAttentionCache | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of every head, (batch, heads, length, dim_head), cached ones included."""
        h_q = self._split_heads(self.project_q(query))
        stored = cache.fetch() if isinstance(cache, CrossAttentionCache) else None
        if stored is not None:
            return h_q, *stored
        if key_value is None:
            raise ValueError("`key_value` must be given unless a cache holds its keys and values, but is None")
        h_k = self._split_heads(self.project_k(key_value))
        h_v = self._split_heads(self.project_v(key_value))
        if isinstance(position_bias, RotaryEmbedding):
            h_q, h_k = position_bias(h_q, h_k, query_offset)
        elif isinstance(position_bias, RotaryPositions):
            h_q, h_k = position_bias.rotate(h_q), position_bias.rotate(h_k)
        return (h_q, h_k, h_v) if cache is None else (h_q, *cache.store(h_k, h_v))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.dim_head).transpose(1, 2)

    def _check_inputs(
        self,
        query: Tensor,
        key_value: Tensor | None,
        position_bias: PositionBias | None,
        head_mask: Tensor | None,
    ) -> tuple[int, int]:
        for name, tensor in (("query", query), ("key_value", key_value)):
            if tensor is not None:
                check_last_dim(name, tensor, "dim_in", self.dim_in)
                if tensor.dim() != 3:
                    raise ValueError(
                        f"`{name}` must have shape (batch, length, dim_in), but its shape is {tuple(tensor.shape)}"
                    )
        kinds, wanted = _POSITION_BIASES[self.pos_bias_type]
        if not isinstance(position_bias, kinds):
            raise ValueError(
                f"`position_bias` must be {wanted} with pos_bias_type={self.pos_bias_type!r}, "
                f"but is {type(position_bias).__name__}"
            )
        if head_mask is not None and tuple(head_mask.shape) != (self.num_heads,):
            raise ValueError(
                f"`head_mask` must have shape (num_heads,) = ({self.num_heads},), but has {tuple(head_mask.shape)}"
            )
        return query.shape[0], query.shape[1]
