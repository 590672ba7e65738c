"""The one place where attention is computed; callers never choose a kernel.

`attend` takes PyTorch's fused kernels whenever they compute the same function, and `attend_reference`, which writes
every step out, otherwise. `attend_packed` does the same for sequences of any lengths without padding between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.layer.attention_mask import AttentionMask, ScoreMask
from model_center.layer.kernels.requirements import fused_kernels_launch, fused_kernels_take
from model_center.layer.position import dense_bias

_FEWEST_QUERIES = 16
"""With fewer queries than that, as in decoding, a bias written out is small and the fused kernels have no work."""
_LOG_SMALLEST_FLOAT64 = math.log(5e-324)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring:
    """How products of queries and keys become attention probabilities.

    Attributes:
        bias: Added to the scores; shape (num_heads, len_q, len_k) or (1 or batch, num_heads, len_q, len_k), or
            (num_heads, len_q + len_k - 1) as `RelativePositionEmbedding.by_distance` gives it.
        scale: Factor of the products.
        mask_value: Score of masked positions before the softmax.
        dropout_p: Probability of dropping an attention probability.
    """

    bias: Tensor | None = None
    scale: float = 1.0
    mask_value: float = float("-inf")
    dropout_p: float = 0.0

    @property
    def masks_completely(self) -> bool:
        """Whether a score of `mask_value` has no weight after the softmax, so that a boolean mask does the same."""
        return self.mask_value < _LOG_SMALLEST_FLOAT64

    @property
    def has_bias_by_distance(self) -> bool:
        """Whether the bias depends on the distance of query and key only and is given that way."""
        return self.bias is not None and self.bias.dim() == 2

    def written_out(self, len_k: int) -> Scoring:
        """Return this with a bias for each query and key."""
        if self.bias is None or not self.has_bias_by_distance:
            return self
        return replace(self, bias=dense_bias(self.bias, len_k))


def shared_bias(
    by_distance: Tensor, hidden_states: Tensor, mask: ScoreMask, dim_head: int, query_offset: int = 0
) -> Tensor:
    """Prepare a bias for all layers of a stack.

    Args:
        by_distance: Shape (num_heads, len_q + len_k - 1).
        hidden_states: The stack's input, shape (batch, len_q, dim_model).
        mask: What may be attended.
        dim_head: Size of each head.
        query_offset: Number of keys before the first query.

    Returns:
        `by_distance` where kernels take it, otherwise the bias written out once, (num_heads, len_q, len_k).
    """
    batch, len_q = hidden_states.shape[:2]
    heads = batch * by_distance.shape[0]
    if len_q >= _FEWEST_QUERIES and _has_structure(mask) and fused_kernels_take(hidden_states, dim_head, heads):
        return by_distance
    return dense_bias(by_distance, query_offset + len_q).to(hidden_states.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Packing:
    """Where sequences lie that follow one another without padding; queries attend their own sequence only.

    Attributes:
        cumulative: int32 of shape (sequences + 1,): sequence i consists of the tokens from `cumulative[i]` to
            `cumulative[i + 1]`. It begins with 0 and ends with the number of tokens; sequences may be empty.
        longest: Length of the longest sequence, or more, known without asking the device.
        is_causal: A query sees its own and earlier positions only.
    """

    cumulative: Tensor
    longest: int
    is_causal: bool = False

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.cumulative.shape[0] - 1

    def slots(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the sequence of each token and its position in that; integers of shape (tokens,)."""
        numbers = torch.arange(tokens, device=self.cumulative.device, dtype=self.cumulative.dtype)
        sequence = torch.searchsorted(self.cumulative, numbers, right=True) - 1
        return sequence, numbers - self.cumulative[sequence]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: ScoreMask,
    scoring: Scoring,
    need_probabilities: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute `softmax(scale · query·keyᵀ + bias)·value` with masked scores replaced by `mask_value`.

    Masked positions have no weight afterwards, whatever `mask_value`; a query that may attend nothing gives zeros.

    Args:
        query: Shape (batch, num_heads, len_q, dim_head).
        key: Shape (batch, num_heads_kv, len_k, dim_head); each key head serves num_heads / num_heads_kv query heads.
        value: Shape of `key`.
        mask: What may be attended.
        scoring: Scale, bias, value of masked scores and dropout.
        need_probabilities: Whether to return the probabilities as well.

    Returns:
        The result, shape (batch, num_heads, len_q, dim_head), and the probabilities (after dropout), shape
        (batch, num_heads, len_q, len_k), or None when they are not needed.
    """
    if scoring.has_bias_by_distance or mask.groups is not None:
        if not need_probabilities and _takes_fused(query, mask, scoring):
            return _attend_fused(query, key, value, mask, scoring), None
        scoring = scoring.written_out(key.shape[2])
    bias = scoring.bias
    # The fused kernels' gradient of a bias is slower than the written-out form, and absent on CPUs.
    learns_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if need_probabilities or learns_bias or not scoring.masks_completely:
        output, probabilities = attend_reference(query, key, value, mask, scoring)
        return output, probabilities if need_probabilities else None
    score_mask = mask.allowed
    is_causal = mask.is_causal
    if bias is not None:
        allowed = mask.dense(query.shape[2], key.shape[2], query.device)
        bias = bias.to(query.dtype)
        score_mask = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
        if score_mask.dim() == 3:
            score_mask = score_mask[None]
        is_causal = False
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=score_mask,
        dropout_p=scoring.dropout_p,
        is_causal=is_causal,
        scale=scoring.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if mask.attends is not None:
        output = output.masked_fill(~mask.attends, 0.0)
    return output, None


def _takes_fused(query: Tensor, mask: ScoreMask, scoring: Scoring) -> bool:
    """Whether our own kernels compute this."""
    knows_bias = scoring.bias is None or scoring.has_bias_by_distance
    known = knows_bias and _has_structure(mask) and scoring.masks_completely
    return known and fused_kernels_take(query, query.shape[-1], query.shape[0] * query.shape[1])


def _has_structure(mask: ScoreMask) -> bool:
    """Whether our own kernels know such masks."""
    return mask.masks_keys_only or mask.groups is not None


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, mask: ScoreMask, scoring: Scoring) -> Tensor:
    # Importing it imports Triton.
    from model_center.layer.kernels.fused_attention import fused_attention

    masked = mask.allowed is not None and mask.key_lengths is None and mask.groups is None
    output = fused_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        bias=scoring.bias,
        key_lengths=mask.key_lengths,
        key_mask=mask.allowed[:, 0, 0] if masked and mask.allowed is not None else None,
        groups=mask.groups,
        group_bounds=mask.group_bounds,
        is_causal=mask.is_causal or mask.groups_are_causal,
        scale=scoring.scale,
        dropout_p=scoring.dropout_p,
    ).transpose(1, 2)
    return output.masked_fill(~mask.attends, 0.0) if masked and mask.attends is not None else output


def attend_packed(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scoring: Scoring) -> Tensor:
    """Compute what `attend` computes, sequence by sequence, for sequences packed without padding.

    Args:
        query: Shape (tokens, num_heads, dim_head).
        key: Shape (tokens, num_heads_kv, dim_head).
        value: Shape of `key`.
        packing: Where sequences begin and end.
        scoring: Scale, bias and dropout; for the bias, which has no batch dimension, len_q = len_k =
            `packing.longest`.

    Returns:
        Shape (tokens, num_heads, dim_head).
    """
    if not scoring.masks_completely or (scoring.bias is not None and not scoring.has_bias_by_distance):
        return attend_packed_reference(query, key, value, packing, scoring)
    num_heads, dim_head = query.shape[1:]
    if not _takes_varlen(query, dim_head, scoring):
        if not fused_kernels_take(query, dim_head, packing.sequences * num_heads):
            return attend_packed_reference(query, key, value, packing, scoring)
        return _attend_packed_fused(query, key, value, packing, scoring)
    # Importing it imports the compiler, which takes seconds.
    from torch.nn.attention.varlen import varlen_attn

    if query.shape[1] != key.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    limits = (packing.cumulative, packing.cumulative, packing.longest, packing.longest)
    window = (-1, 0) if packing.is_causal else (-1, -1)
    output = varlen_attn(query, key, value, *limits, scale=scoring.scale, window_size=window)
    assert isinstance(output, Tensor)
    return output


def packed_kernels_launch(x: Tensor, dim_head: int, heads: int, scoring: Scoring) -> bool:
    """Return whether the kernels of `attend_packed` take so many heads at once.

    Args:
        x: The hidden states that queries are made of.
        dim_head: Size of each head.
        heads: Number of heads of all sequences together.
        scoring: What `attend_packed` takes.
    """
    return _takes_varlen(x, dim_head, scoring) or fused_kernels_launch(heads)


def _takes_varlen(x: Tensor, dim_head: int, scoring: Scoring) -> bool:
    """Whether PyTorch's kernel for packed sequences computes this."""
    return (
        x.is_cuda
        and torch.cuda.get_device_capability(x.device) >= (8, 0)  # what FlashAttention needs, not our kernels
        and x.dtype in (torch.float16, torch.bfloat16)
        and dim_head % 8 == 0
        and dim_head <= 256
        and scoring.bias is None
        and scoring.dropout_p == 0.0
    )


def _attend_packed_fused(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scoring: Scoring) -> Tensor:
    # Importing it imports Triton.
    from model_center.layer.kernels.fused_attention import fused_attention

    return fused_attention(
        query[None],
        key[None],
        value[None],
        bias=scoring.bias,
        cumulative=packing.cumulative,
        longest=packing.longest,
        is_causal=packing.is_causal,
        scale=scoring.scale,
        dropout_p=scoring.dropout_p,
    )[0]


def attend_packed_reference(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scoring: Scoring) -> Tensor:
    """Put padding between the sequences and call `attend`; arguments and result are those of `attend_packed`."""
    sequence, position = packing.slots(query.shape[0])
    count, longest = packing.sequences, packing.longest

    def padded(x: Tensor) -> Tensor:
        room = x.new_zeros(count, longest, *x.shape[1:])
        return room.index_put((sequence, position), x).transpose(1, 2)

    mask = AttentionMask(causal=packing.is_causal, lengths=packing.cumulative.diff())
    score_mask = mask.resolve(longest, longest, query.device)
    output, _ = attend(padded(query), padded(key), padded(value), score_mask, scoring)
    return output[sequence, :, position]


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: ScoreMask, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step; arguments and results are those of `attend`."""
    batch, num_heads, len_q, _ = query.shape
    num_heads_kv, len_k = key.shape[1:3]
    scoring = scoring.written_out(len_k)
    grouped = query.reshape(batch, num_heads_kv, num_heads // num_heads_kv * len_q, -1)
    if scoring.scale != 1.0:
        grouped = grouped * scoring.scale
    scores = torch.matmul(grouped, key.transpose(-1, -2)).view(batch, num_heads, len_q, len_k)
    if scoring.bias is not None:
        scores = scores + scoring.bias.to(scores.dtype)
    masked = None
    allowed = mask.dense(len_q, len_k, query.device)
    if allowed is not None:
        masked = ~allowed
        scores = scores.masked_fill(masked, float("-inf") if scoring.masks_completely else scoring.mask_value)
    probabilities = torch.softmax(scores, dim=-1)
    if masked is not None and not scoring.masks_completely:
        probabilities = probabilities.masked_fill(masked, 0.0)
    if mask.attends is not None:
        probabilities = probabilities.masked_fill(~mask.attends, 0.0)
    probabilities = F.dropout(probabilities, scoring.dropout_p)
    output = torch.matmul(probabilities.view(batch, num_heads_kv, -1, len_k), value)
    return output.view(batch, num_heads, len_q, -1), probabilities
