"""What the skeletons share about inputs: masks, positions, token ids or embeddings, head masks."""

from dataclasses import replace

import torch
from torch import Tensor

from model_center.layer import AttentionMask, Embedding


def attention_mask_of(
    length: Tensor | None,
    attention_mask: Tensor | AttentionMask | None,
    *,
    shape: tuple[int, int],
    causal: bool = False,
    prefix: str = "",
) -> AttentionMask:
    """What may be attended.

    Args:
        length: (batch,) number of real positions, the rest being padding on the right.
        attention_mask: (batch, total) with 0 where there is padding, (batch, queries, total) with 0 where a query may
            not attend, or an `AttentionMask`. Without both nothing is masked.
        shape: batch and total, the number of positions including cached ones.
        causal: whether positions see only themselves and earlier ones.
        prefix: what the caller's argument names begin with.

    Raises:
        ValueError: both are given, or one has a wrong shape or type.
    """
    if length is not None and attention_mask is not None:
        raise ValueError(f"give `{prefix}length` or `{prefix}attention_mask`, not both")
    batch = shape[0]
    if length is not None:
        if length.shape != (batch,) or length.is_floating_point() or length.dtype == torch.bool:
            raise ValueError(
                f"`{prefix}length` must be an integer tensor of shape (batch,) = ({batch},), "
                f"but is {length.dtype} of shape {tuple(length.shape)}"
            )
        return AttentionMask(causal=causal, lengths=length)
    if attention_mask is None:
        return AttentionMask(causal=causal)
    if isinstance(attention_mask, AttentionMask):
        return replace(attention_mask, causal=causal or attention_mask.causal)
    if attention_mask.is_floating_point():
        raise ValueError(
            f"`{prefix}attention_mask` must be a boolean or integer tensor with 0 at padding, "
            f"but is {attention_mask.dtype}"
        )
    if attention_mask.ndim == 3:
        return AttentionMask(causal=causal, dense=attention_mask != 0)
    if attention_mask.shape != shape:
        raise ValueError(
            f"`{prefix}attention_mask` must have shape (batch, positions) = {shape}, cached positions included, "
            f"but has {tuple(attention_mask.shape)}"
        )
    return AttentionMask(causal=causal, key_padding=attention_mask == 0)


def embedded(embedding: Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None, prefix: str = "") -> Tensor:
    """The embeddings of the input, (batch, seq_len, dim_model).

    Args:
        embedding: the input embedding.
        input_ids: (batch, seq_len) token ids.
        inputs_embeds: (batch, seq_len, dim_model), instead of token ids.
        prefix: what the caller's argument names begin with ("decoder_").

    Raises:
        ValueError: not exactly one of them is given, or its shape is wrong.
    """
    ids_name, embeds_name = f"{prefix}input_ids", f"{prefix}inputs_embeds"
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"give exactly one of `{ids_name}` and `{embeds_name}`")
    if input_ids is not None:
        if input_ids.ndim != 2:
            raise ValueError(f"`{ids_name}` must have shape (batch, seq_len), but has {tuple(input_ids.shape)}")
        ids: Tensor = embedding(input_ids)
        return ids
    assert inputs_embeds is not None
    if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != embedding.embedding_size:
        raise ValueError(
            f"`{embeds_name}` must have shape (batch, seq_len, {embedding.embedding_size}), "
            f"but has {tuple(inputs_embeds.shape)}"
        )
    return inputs_embeds


def expanded_head_mask(head_mask: Tensor | None, num_layers: int) -> Tensor | None:
    """The head mask of every layer, (num_layers, num_heads), from that or from (num_heads,)."""
    return head_mask.expand(num_layers, -1) if head_mask is not None and head_mask.ndim == 1 else head_mask
