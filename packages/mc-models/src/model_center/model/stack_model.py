"""What encoders and decoders of a single stack share: embeddings, positions, masks, the stack itself."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.layer import (
    AttentionMask,
    Decoder,
    Embedding,
    Encoder,
    KeyValueCache,
    RelativePositionEmbedding,
    RotaryEmbedding,
    RotaryPositions,
    StackOutput,
)
from model_center.model.base import BaseModel, build
from model_center.model.config import Config
from model_center.model.inputs import attention_mask_of, embedded, expanded_head_mask
from model_center.model.outputs import ModelOutput


@dataclass(kw_only=True)
class StackConfig(Config):
    """Options of models with a single stack."""

    num_layers: int = 12
    """Number of layers."""
    position_size: int | None = None
    """Number of learnt absolute positions, which bounds the length of inputs; None for no such embedding."""
    pos_rotary_dim: int | None = None
    """Elements of each head that are rotated, with `pos_bias_type="rotary"`; None for all `dim_head`."""
    ffn_dropout_p: float | None = 0.0
    """Dropout inside the feed-forward layers, which BERT and the GPTs do not have; None means `dropout_p`."""
    add_cross_attention: bool = False
    """Give each layer a cross-attention, for `encoder_hidden_states`."""

    @property
    def depths(self) -> dict[str, int]:
        """Number of layers of the stack, which is called `encoder` in every model."""
        return {"encoder": self.num_layers}


class StackModel(BaseModel):
    """Embeddings and one stack of layers, with whatever positions the configuration asks for."""

    config: StackConfig

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.input_embedding = build(Embedding, config, "emb_", embedding_size=config.dim_model)
        if config.position_size is not None:
            self.position_embedding = build(
                Embedding, config, "emb_", vocab_size=config.position_size, embedding_size=config.dim_model
            )
        if config.pos_bias_type == "relative":
            self.position_bias = build(
                RelativePositionEmbedding,
                config,
                "position_bias_",
                bidirectional=self.looks_ahead,
                init_mean=config.pos_init_mean,
                init_std=config.pos_init_std,
            )
        if config.pos_bias_type == "rotary":
            self.rotary_embedding = RotaryEmbedding(config.pos_rotary_dim or config.dim_head)
        self.encoder = build(Decoder if config.add_cross_attention else Encoder, config)

    @property
    def causal(self) -> bool:
        """Whether positions see only themselves and earlier ones."""
        raise NotImplementedError

    @property
    def looks_ahead(self) -> bool:
        """Whether relative positions tell what comes after a position from what comes before it."""
        return not self.causal

    def new_cache(self, max_length: int) -> KeyValueCache:
        """An empty key-value cache for `past_key_values`, with room for `max_length` positions."""
        return KeyValueCache(self.config.num_layers, max_length)

    def forward(
        self,
        input_ids: Tensor | None = None,
        length: Tensor | None = None,
        attention_mask: Tensor | AttentionMask | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | AttentionMask | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
        return_logits: bool = False,
        *,
        past_key_values: KeyValueCache | None = None,
        use_cache: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...] | Tensor:
        """Runs the model.

        Args:
            input_ids: (batch, seq_len) token ids; with `past_key_values` only the new ones.
            length: (batch,) number of real tokens, cached ones included, the rest being padding on the right.
            attention_mask: (batch, total) with 0 at padding, where total counts cached tokens, too;
                (batch, seq_len, total) with 0 where attention is not allowed; or an `AttentionMask`. Without it and
                `length` nothing is padding. Causal models see earlier positions only, in any case.
            token_type_ids: (batch, seq_len), segments of an encoder (by default 0), or token ids whose embeddings
                are added in a decoder, as in Transformers.
            position_ids: (batch, seq_len), by default counted from 0, or from the number of cached tokens.
            head_mask: (num_layers, num_heads) or (num_heads,), what each head's output is multiplied by.
            inputs_embeds: (batch, seq_len, dim_model) instead of `input_ids`.
            encoder_hidden_states: (batch, encoder_len, dim_model) for cross-attention (`add_cross_attention`).
            encoder_attention_mask: (batch, encoder_len), 0 at the encoder's padding.
            output_attentions: return attention probabilities, too.
            output_hidden_states: return the hidden states of all layers, too.
            return_dict: return an output object rather than a plain tuple.
            return_logits: return only the logits.
            past_key_values: keys and values of earlier tokens (causal models only); takes up those of these.
            use_cache: make and return `past_key_values` where none is given.

        Returns:
            The family's output object, a tuple of its values, or with `return_logits` the logits
            (batch, seq_len, vocab_size), or (batch, seq_len, cls_head) with a classification head.
        """
        hidden_states = embedded(self.input_embedding, input_ids, inputs_embeds)
        batch, seq_len = hidden_states.shape[:2]
        if (past_key_values is not None or use_cache) and not self.causal:
            raise ValueError("`past_key_values` and `use_cache` need a causal model (`is_decoder=True`)")
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache(2 * seq_len)
        offset = 0 if past_key_values is None else past_key_values.length
        positions = self._positions(position_ids, offset, hidden_states)
        if self.config.position_size is not None:
            hidden_states = hidden_states + self.position_embedding(positions)
        hidden_states = self.add_token_types(hidden_states, token_type_ids)
        # The norm over BERT's embeddings is the first layer's here, so that dropout comes before it, not after it.
        hidden_states = F.dropout(hidden_states, self.config.dropout_p, self.training)
        output = self.encoder(
            hidden_states,
            attention_mask_of(length, attention_mask, shape=(batch, offset + seq_len), causal=self.causal),
            self._position_bias(positions, offset, hidden_states),
            *self._cross(encoder_hidden_states, encoder_attention_mask, past_key_values, batch),
            head_mask=expanded_head_mask(head_mask, self.config.num_layers),
            cache=past_key_values,
            output_attentions=bool(output_attentions),
            output_hidden_states=bool(output_hidden_states),
        )
        output = output if isinstance(output, StackOutput) else StackOutput(output)
        if return_logits:
            return self.logits(output.last_hidden_state)
        outputs = self.outputs(output, past_key_values)
        return outputs if return_dict else outputs.to_tuple()

    def add_token_types(self, hidden_states: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Adds the embeddings of token types to those of tokens and positions, (batch, seq_len, dim_model)."""
        raise NotImplementedError

    def outputs(self, output: StackOutput, cache: KeyValueCache | None) -> ModelOutput:
        """The family's output object."""
        raise NotImplementedError

    def _positions(self, position_ids: Tensor | None, offset: int, hidden_states: Tensor) -> Tensor:
        """The positions, (seq_len,) or (batch, seq_len); checked against the number of embeddings."""
        seq_len, size = hidden_states.shape[1], self.config.position_size
        if position_ids is None:
            if size is not None and offset + seq_len > size:
                raise ValueError(
                    f"inputs must be at most `position_size` ({size}) positions long, but reach {offset + seq_len}"
                )
            return torch.arange(offset, offset + seq_len, device=hidden_states.device)
        if size is None and self.config.pos_bias_type != "rotary":
            raise ValueError("`position_ids` must be None in a model without absolute or rotary positions")
        if position_ids.shape not in ((1, seq_len), tuple(hidden_states.shape[:2])):
            raise ValueError(
                f"`position_ids` must have shape (batch, seq_len) = {tuple(hidden_states.shape[:2])}, "
                f"but has {tuple(position_ids.shape)}"
            )
        return position_ids

    def _position_bias(self, positions: Tensor, offset: int, hidden_states: Tensor) -> Tensor | RotaryPositions | None:
        seq_len = hidden_states.shape[1]
        if self.config.pos_bias_type == "relative":
            bias: Tensor = self.position_bias.by_distance(seq_len, offset + seq_len, offset)
            return bias
        if self.config.pos_bias_type == "rotary":
            return self.rotary_embedding.positions(positions, hidden_states.dtype)
        return None

    def _cross(
        self, states: Tensor | None, mask: Tensor | AttentionMask | None, cache: KeyValueCache | None, batch: int
    ) -> tuple[Any, ...]:
        """What the stack takes for cross-attention, if it has any."""
        if not self.config.add_cross_attention:
            if states is not None or mask is not None:
                raise ValueError(
                    "`encoder_hidden_states` and `encoder_attention_mask` must be None in a model without "
                    "cross-attention; build it with `add_cross_attention=True`"
                )
            return ()
        length = states.shape[1] if states is not None else 0 if cache is None else cache.cross_length
        if length == 0 and mask is not None:
            raise ValueError("`encoder_attention_mask` needs `encoder_hidden_states`")
        return states, attention_mask_of(None, mask, shape=(batch, length), prefix="encoder_")
