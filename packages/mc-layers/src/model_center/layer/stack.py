"""Encoder and decoder: transformer blocks and a final normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from model_center.engine import TransformerBlockList, current_engine
from model_center.layer.attention import Mask, PositionBias
from model_center.layer.attention_kernels import Scoring, packed_kernels_launch, shared_bias
from model_center.layer.attention_mask import AttentionMask, resolve_mask
from model_center.layer.blocks import TransformerBlock
from model_center.layer.cache import KeyValueCache
from model_center.layer.checks import check_last_dim, check_positive
from model_center.layer.layernorm import LayerNorm
from model_center.layer.module import Module
from model_center.layer.options import BlockOptions, select
from model_center.layer.padding import real_positions, saves_padding
from model_center.layer.position import RotaryPositions


@dataclass(frozen=True, eq=False)
class StackOutput:
    """What a stack returns when asked for more than its last hidden state.

    Attributes:
        last_hidden_state: Shape (batch, seq, dim_model), normalised.
        hidden_states: If asked for, one tensor more than there are layers: the residual stream before each of them
            (normalised with `post_layer_norm`) and `last_hidden_state`, as Transformers counts them.
        attentions: If asked for, each layer's self-attention probabilities, (batch, num_heads, seq, seq).
        cross_attentions: Likewise for cross-attention, (batch, num_heads, seq, seq_cross), if there is any.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False, repr=False)
class _Stack(BlockOptions, Module):
    """Encoder or decoder.

    Args:
        num_layers: Number of blocks.
        dim_model: Size of the residual stream.
        dim_ff: Size of the feed-forward layers' middle.
        num_heads: Number of attention heads.
        dim_head: Size of each head.

    The other options are described in `BlockOptions` and the groups it inherits.
    """

    num_layers: int
    dim_model: int
    dim_ff: int
    num_heads: int
    dim_head: int

    _is_decoder: ClassVar[bool]

    def __post_init__(self) -> None:
        check_positive(num_layers=self.num_layers)
        options = select(TransformerBlock, self, is_decoder=self._is_decoder)
        self.layers = TransformerBlockList(TransformerBlock(**options) for _ in range(self.num_layers))
        self.output_layernorm = LayerNorm(**select(LayerNorm, self, prefix="norm_", dim_norm=self.dim_model))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Mask | None,
        position_bias: PositionBias | None = None,
        cross_hidden_states: Tensor | None = None,
        cross_attention_mask: Mask | None = None,
        cross_position_bias: PositionBias | None = None,
        head_mask: Tensor | None = None,
        cross_head_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Tensor | StackOutput:
        """Run all blocks; everything that concerns attention is what `TransformerBlock.forward` takes.

        Args:
            hidden_states: Shape (batch, seq, dim_model), for instance embeddings.
            attention_mask: For all blocks; (batch, seq, seq) if dense.
            position_bias: For all blocks; (num_heads, seq, seq) if a tensor, or what
                `RelativePositionEmbedding.by_distance` gives, (num_heads, 2·seq - 1).
            cross_hidden_states: What a decoder attends besides itself, (batch, seq_cross, dim_model), for instance
                the encoder's output.
            cross_attention_mask: For all blocks; (batch, seq, seq_cross) if dense.
            cross_position_bias: For all blocks; (num_heads, seq, seq_cross).
            head_mask: *Added.* Factors of all self-attention heads, shape (num_layers, num_heads).
            cross_head_mask: *Added.* Factors of all cross-attention heads, shape (num_layers, num_heads).
            cache: *Added.* Keys and values of earlier positions, which are then not part of `hidden_states`.
            output_attentions: *Added.* Return every layer's attention probabilities as well.
            output_hidden_states: *Added.* Return the hidden states between layers as well.

        Returns:
            Shape (batch, seq, dim_model), or a `StackOutput` if more is asked for. On GPUs, in half precision, blocks
            leave out padding that the attention mask tells of, if only the last hidden state is asked for and there
            is no cross-attention; at padded positions the output is then `hidden_states` as they were given.
        """
        self._check_inputs(hidden_states, head_mask, cross_head_mask, cache)
        wanted = output_attentions or output_hidden_states
        more = (cross_hidden_states, cross_attention_mask, cross_position_bias, head_mask, cross_head_mask, cache)
        if not wanted and all(value is None for value in more):
            without_padding = self._run_without_padding(hidden_states, attention_mask, position_bias)
            if without_padding is not None:
                return without_padding
        batch, len_q = hidden_states.shape[:2]
        cached = 0 if cache is None else cache.length
        # The masks' tensors are made once, for all blocks.
        sizes: dict[str, Any] = {"batch": batch, "len_q": len_q, "device": hidden_states.device}
        attention_mask = resolve_mask(attention_mask, **sizes, len_k=cached + len_q, query_offset=cached)
        cross_length = 0 if cache is None else cache.cross_length
        if cross_hidden_states is not None:
            cross_length = cross_hidden_states.shape[1]
        if cross_attention_mask is not None and cross_length:
            cross_attention_mask = resolve_mask(cross_attention_mask, **sizes, len_k=cross_length, query_offset=0)
        if isinstance(position_bias, Tensor) and position_bias.dim() == 2:
            position_bias = shared_bias(position_bias, hidden_states, attention_mask, self.dim_head, cached)
        shared = (attention_mask, position_bias, cross_hidden_states, cross_attention_mask, cross_position_bias)
        if not wanted and head_mask is None and cross_head_mask is None and cache is None:
            output: Tensor = self.output_layernorm(self.layers(hidden_states, *shared))
            return output
        per_layer = []
        for index, layer in enumerate(self.layers):
            result = layer(
                hidden_states,
                *shared,
                None if head_mask is None else head_mask[index],
                None if cross_head_mask is None else cross_head_mask[index],
                None if cache is None else cache.layers[index],
                output_attentions,
                output_hidden_states,
            )
            if wanted:
                hidden_states = result[0]
                per_layer.append(result)
            else:
                hidden_states = result
        last: Tensor = self.output_layernorm(hidden_states)
        if not wanted:
            return last
        _, attentions, cross_attentions, layer_inputs = zip(*per_layer, strict=True)
        return StackOutput(
            last,
            hidden_states=(*layer_inputs, last) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            cross_attentions=cross_attentions if cross_attentions[0] is not None else None,
        )

    def _run_without_padding(
        self, hidden_states: Tensor, mask: Mask | None, position_bias: PositionBias | None
    ) -> Tensor | None:
        """Return what `forward` does, but its input at padding; None where leaving it out is no gain or not possible.

        Zeros there would make the norm of a head multiply gradients by a million, if a script has labels at padding.
        """
        by_distance = isinstance(position_bias, Tensor) and position_bias.dim() == 2
        known = position_bias is None or by_distance or isinstance(position_bias, RotaryPositions)
        if not known or not isinstance(mask, AttentionMask) or not saves_padding(hidden_states, self.dim_head):
            return None
        real = real_positions(mask, *hidden_states.shape[:2], adjacent=by_distance)
        if real is None:
            return None
        dropout_p = self.dropout_p if self.att_dropout_p is None else self.att_dropout_p
        bias = position_bias if isinstance(position_bias, Tensor) else None
        scoring = Scoring(bias=bias, dropout_p=dropout_p if self.training else 0.0)
        # There may be so many more documents than rows that the kernels take the rows only.
        heads = real.packing.sequences * self.num_heads
        if not packed_kernels_launch(hidden_states, self.dim_head, heads, scoring):
            return None
        if isinstance(position_bias, RotaryPositions):
            position_bias = real.rotations(position_bias)
        row = self.layers(real.take(hidden_states), real.packing, position_bias)
        return real.put_back(self.output_layernorm(row), hidden_states)

    def _check_inputs(
        self,
        hidden_states: Tensor,
        head_mask: Tensor | None,
        cross_head_mask: Tensor | None,
        cache: KeyValueCache | None,
    ) -> None:
        check_last_dim("hidden_states", hidden_states, "dim_model", self.dim_model)
        if hidden_states.dim() != 3:
            raise ValueError(
                f"`hidden_states` must have shape (batch, length, dim_model), but its shape is "
                f"{tuple(hidden_states.shape)}"
            )
        expected = (self.num_layers, self.num_heads)
        for name, mask in (("head_mask", head_mask), ("cross_head_mask", cross_head_mask)):
            if mask is not None and tuple(mask.shape) != expected:
                raise ValueError(
                    f"`{name}` must have shape (num_layers, num_heads) = {expected}, but has {tuple(mask.shape)}"
                )
        if cache is None:
            return
        if len(cache.layers) != self.num_layers:
            raise ValueError(
                f"`cache` must have one entry for each of the {self.num_layers} layers, but has {len(cache.layers)}"
            )
        if torch.is_grad_enabled() and current_engine().use_checkpoint:
            raise ValueError(
                "`cache` must be None while blocks recompute their activations in backward, because keys would be "
                "stored twice; call under torch.no_grad(), or use init_distributed(use_checkpoint=False)"
            )


class Encoder(_Stack):
    """Transformer blocks of self-attention, and a final normalisation. With a causal mask it is a GPT's decoder.

    Its `forward` refuses everything that begins with `cross_`.
    """

    _is_decoder = False


class Decoder(_Stack):
    """Transformer blocks of self-attention and cross-attention, and a final normalisation.

    Without `cross_hidden_states`, and without a cache that holds their keys and values, cross-attention is left out.
    """

    _is_decoder = True
