"""The three residual sub-layers of a transformer, and the block that chains them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from model_center.layer.attention import Attention, Mask, PositionBias
from model_center.layer.attention_kernels import Packing
from model_center.layer.cache import CrossAttentionCache, LayerCache, SelfAttentionCache
from model_center.layer.checks import check_last_dim, check_positive, check_probability
from model_center.layer.feedforward import FeedForward
from model_center.layer.layernorm import LayerNorm
from model_center.layer.module import Module
from model_center.layer.options import (
    AttentionOptions,
    BlockOptions,
    DropoutOptions,
    FeedForwardOptions,
    NormOptions,
    PrecisionOptions,
    ScaleOptions,
    select,
)


@dataclass(kw_only=True, eq=False, repr=False)
class _ResidualOptions(NormOptions, ScaleOptions, DropoutOptions, PrecisionOptions):
    """What every sub-layer around a residual stream is told."""


class _ResidualBlock(_ResidualOptions, Module):
    """`x + dropout(f(norm(x)))`, or with `post_layer_norm` `y + dropout(f(y))` where `y = norm(x)`."""

    def _split(self, norm: LayerNorm, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual stream and the input of `f`."""
        normed = norm(hidden_states)
        return (normed if self.post_layer_norm else hidden_states), normed

    def _merge(self, residual: Tensor, output: Tensor) -> Tensor:
        if self.training and self.dropout_p:
            output = F.dropout(output, self.dropout_p)
        return residual + output


@dataclass(eq=False, repr=False)
class _AttentionBlock(AttentionOptions, _ResidualBlock):
    """What self-attention and cross-attention share: names, options and the residual connection."""

    dim_model: int
    num_heads: int
    dim_head: int

    def __post_init__(self) -> None:
        check_positive(dim_model=self.dim_model)
        check_probability(dropout_p=self.dropout_p)
        self.layernorm_before_attention = LayerNorm(**select(LayerNorm, self, prefix="norm_", dim_norm=self.dim_model))
        self.self_attention = Attention(**select(Attention, self, prefix="att_", dim_in=self.dim_model))

    def _attend(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None,
        attention_mask: Mask | Packing | None,
        position_bias: PositionBias | None,
        head_mask: Tensor | None,
        cache: SelfAttentionCache | CrossAttentionCache | None,
        output_attentions: bool,
        attend_itself: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_last_dim("hidden_states", hidden_states, "dim_model", self.dim_model)
        residual, normed = self._split(self.layernorm_before_attention, hidden_states)
        output = self.self_attention(
            normed,
            normed if attend_itself else key_value_states,
            attention_mask,
            position_bias,
            head_mask,
            cache,
            output_attentions,
        )
        if output_attentions:
            return self._merge(residual, output[0]), output[1]
        return self._merge(residual, output)


@dataclass(eq=False, repr=False)
class SelfAttentionBlock(_AttentionBlock):
    """Normalisation, self-attention and residual connection.

    In training, `dropout_p` drops attention probabilities (`att_dropout_p` if given) and elements of the output before
    it is added to the residual stream, as in BERT, GPT-2, GPT-J and T5.

    Args:
        dim_model: Size of the residual stream.
        num_heads: Number of attention heads.
        dim_head: Size of each head.

    The other options are described in `AttentionOptions`, `NormOptions`, `ScaleOptions`, `DropoutOptions` and
    `PrecisionOptions`.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Mask | Packing | None,
        position_bias: PositionBias | None = None,
        head_mask: Tensor | None = None,
        cache: SelfAttentionCache | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Let every position attend the others.

        Args:
            hidden_states: Shape (batch, seq_self, dim_model).
            attention_mask: What may be attended; see `Attention.forward`, as for the remaining arguments.
            position_bias: Shape (num_heads, seq_self, seq_self), or rotations.
            head_mask: *Added.* Factor of each head, shape (num_heads,).
            cache: *Added.* Earlier keys and values.
            output_attentions: *Added.* Return the attention probabilities as well.

        Returns:
            Shape (batch, seq_self, dim_model); with `output_attentions` also the probabilities.
        """
        return self._attend(
            hidden_states, None, attention_mask, position_bias, head_mask, cache, output_attentions, attend_itself=True
        )


@dataclass(eq=False, repr=False)
class CrossAttentionBlock(_AttentionBlock):
    """Normalisation, attention to another sequence and residual connection.

    The attended states are taken as they are, not normalised. Options and dropout are those of `SelfAttentionBlock`;
    the attention keeps the name `self_attention`, as in existing checkpoints.

    Args:
        dim_model: Size of the residual stream.
        num_heads: Number of attention heads.
        dim_head: Size of each head.
    """

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None,
        attention_mask: Mask | None,
        position_bias: PositionBias | None = None,
        head_mask: Tensor | None = None,
        cache: CrossAttentionCache | None = None,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Let every position attend the positions of `key_value_states`.

        Args:
            hidden_states: Shape (batch, seq_self, dim_model).
            key_value_states: Shape (batch, seq_cross, dim_model). Not looked at, and may be None, once `cache` holds
                its keys and values.
            attention_mask: What may be attended; see `Attention.forward`, as for the remaining arguments.
            position_bias: Shape (num_heads, seq_self, seq_cross), or rotations.
            head_mask: *Added.* Factor of each head, shape (num_heads,).
            cache: *Added.* Keys and values of `key_value_states`, stored at the first call.
            output_attentions: *Added.* Return the attention probabilities as well.

        Returns:
            Shape (batch, seq_self, dim_model); with `output_attentions` also the probabilities.
        """
        return self._attend(
            hidden_states,
            key_value_states,
            attention_mask,
            position_bias,
            head_mask,
            cache,
            output_attentions,
            attend_itself=False,
        )


@dataclass(eq=False, repr=False)
class FFNBlock(FeedForwardOptions, _ResidualBlock):
    """Normalisation, feed-forward layer and residual connection.

    In training, `dropout_p` drops elements of the output before it is added to the residual stream, and elements of
    the activated middle too (as T5 does; `ffn_dropout_p=0` for models that don't, such as BERT and GPT-2).

    Args:
        dim_model: Size of the residual stream.
        dim_ff: Size of the feed-forward layer's middle.

    The other options are described in `FeedForwardOptions`, `NormOptions`, `ScaleOptions`, `DropoutOptions` and
    `PrecisionOptions`.
    """

    dim_model: int
    dim_ff: int

    def __post_init__(self) -> None:
        check_positive(dim_model=self.dim_model)
        check_probability(dropout_p=self.dropout_p)
        self.layernorm_before_ffn = LayerNorm(**select(LayerNorm, self, prefix="norm_", dim_norm=self.dim_model))
        self.ffn = FeedForward(**select(FeedForward, self, prefix="ffn_", dim_in=self.dim_model))

    def forward(self, hidden_states: Tensor, add_to: Tensor | None = None) -> Tensor:
        """Transform every position by itself.

        Args:
            hidden_states: Shape (batch, seq_self, dim_model).
            add_to: *Added.* What the output is added to, instead of `hidden_states`; for parallel blocks.

        Returns:
            Shape (batch, seq_self, dim_model).
        """
        check_last_dim("hidden_states", hidden_states, "dim_model", self.dim_model)
        residual, normed = self._split(self.layernorm_before_ffn, hidden_states)
        return self._merge(residual if add_to is None else add_to, self.ffn(normed))


class BlockOutput(NamedTuple):
    """What `TransformerBlock` returns when asked for more than hidden states."""

    hidden_states: Tensor
    """Shape (batch, seq_self, dim_model)."""
    self_attention: Tensor | None
    """Probabilities, shape (batch, num_heads, seq_self, seq_self), if asked for."""
    cross_attention: Tensor | None
    """Probabilities, shape (batch, num_heads, seq_self, seq_cross), if asked for and there is cross-attention."""
    layer_input: Tensor | None
    """The residual stream the block began with (normalised with `post_layer_norm`), if asked for."""


@dataclass(eq=False, repr=False)
class TransformerBlock(BlockOptions, Module):
    """Self-attention, cross-attention if `is_decoder`, and feed-forward layer.

    Args:
        dim_model: Size of the residual stream.
        dim_ff: Size of the feed-forward layer's middle.
        num_heads: Number of attention heads.
        dim_head: Size of each head.
        is_decoder: Whether there is cross-attention.

    The other options are described in `BlockOptions` and the groups it inherits.
    """

    dim_model: int
    dim_ff: int
    num_heads: int
    dim_head: int
    is_decoder: bool = False

    def __post_init__(self) -> None:
        if self.parallel_ffn and self.post_layer_norm:
            raise ValueError(
                "`parallel_ffn` must be False with `post_layer_norm`, which normalises the residual stream "
                "between attention and feed-forward layer, but both are True"
            )
        self.self_att = SelfAttentionBlock(**select(SelfAttentionBlock, self))
        self.cross_att = None
        if self.is_decoder:
            # Rotations tell positions within one sequence; between two they mean nothing.
            pos_bias_type = "none" if self.pos_bias_type == "rotary" else self.pos_bias_type
            self.cross_att = CrossAttentionBlock(**select(CrossAttentionBlock, self, pos_bias_type=pos_bias_type))
        self.ffn = FFNBlock(**select(FFNBlock, self))

    def forward(
        self,
        self_hidden_states: Tensor,
        self_attention_mask: Mask | Packing | None,
        self_position_bias: PositionBias | None = None,
        cross_hidden_states: Tensor | None = None,
        cross_attention_mask: Mask | None = None,
        cross_position_bias: PositionBias | None = None,
        self_head_mask: Tensor | None = None,
        cross_head_mask: Tensor | None = None,
        cache: LayerCache | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> Tensor | BlockOutput:
        """Run the block. Pass arguments by position: an engine may have wrapped the block.

        Args:
            self_hidden_states: Shape (batch, seq_self, dim_model).
            self_attention_mask: What self-attention may attend; see `Attention.forward`.
            self_position_bias: Shape (num_heads, seq_self, seq_self), or rotations.
            cross_hidden_states: Shape (batch, seq_cross, dim_model); without it (and without a cache that holds it)
                there is no cross-attention.
            cross_attention_mask: What cross-attention may attend, (batch, seq_self, seq_cross) if dense.
            cross_position_bias: Shape (num_heads, seq_self, seq_cross).
            self_head_mask: *Added.* Factor of each head of self-attention, shape (num_heads,).
            cross_head_mask: *Added.* Factor of each head of cross-attention, shape (num_heads,).
            cache: *Added.* Earlier keys and values.
            output_attentions: *Added.* Return attention probabilities as well.
            output_hidden_states: *Added.* Return the block's (normalised) input as well.

        Returns:
            Shape (batch, seq_self, dim_model), or a `BlockOutput` if more is asked for.
        """
        self_attention = cross_attention = layer_input = None
        if output_hidden_states:
            norm = self.self_att.layernorm_before_attention
            layer_input = norm(self_hidden_states) if self.post_layer_norm else self_hidden_states
        hidden_states = self.self_att(
            self_hidden_states,
            self_attention_mask,
            self_position_bias,
            self_head_mask,
            None if cache is None else cache.self_attention,
            output_attentions,
        )
        if output_attentions:
            hidden_states, self_attention = hidden_states
        cross_cache = None if cache is None else cache.cross_attention
        if cross_hidden_states is not None or (cross_cache is not None and cross_cache.length):
            if self.cross_att is None:
                raise ValueError("`cross_hidden_states` must be None in an encoder (is_decoder=False)")
            hidden_states = self.cross_att(
                hidden_states,
                cross_hidden_states,
                cross_attention_mask,
                cross_position_bias,
                cross_head_mask,
                cross_cache,
                output_attentions,
            )
            if output_attentions:
                hidden_states, cross_attention = hidden_states
        elif not (cross_attention_mask is None and cross_position_bias is None and cross_head_mask is None):
            raise ValueError(
                "`cross_attention_mask`, `cross_position_bias` and `cross_head_mask` must be None without "
                "`cross_hidden_states`"
            )
        if self.parallel_ffn:
            hidden_states = self.ffn(self_hidden_states, hidden_states)
        else:
            hidden_states = self.ffn(hidden_states)
        if output_attentions or output_hidden_states:
            return BlockOutput(hidden_states, self_attention, cross_attention, layer_input)
        output: Tensor = hidden_states
        return output
