"""The one place where attention is computed; callers never choose a kernel.

`attend` takes PyTorch's fused kernels whenever they compute the same function, and `attend_reference`, which writes
every step out, otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.layer.attention_mask import ScoreMask

_LOG_SMALLEST_FLOAT64 = math.log(5e-324)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scoring:
    """How products of queries and keys become attention probabilities.

    Attributes:
        bias: Added to the scores; shape (num_heads, len_q, len_k) or (1 or batch, num_heads, len_q, len_k).
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


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: ScoreMask, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step; arguments and results are those of `attend`."""
    batch, num_heads, len_q, _ = query.shape
    num_heads_kv, len_k = key.shape[1:3]
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
