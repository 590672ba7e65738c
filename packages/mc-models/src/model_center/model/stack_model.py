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
    Linear,
    RelativePositionEmbedding,
    RotaryEmbedding,
    RotaryPositions,
    StackOutput,
)
from model_center.model.base import BaseModel, build
from model_center.model.config import Config
from model_center.model.inputs import attention_mask_of, embedded, expanded_head_mask


@dataclass(kw_only=True)
class StackConfig(Config):
    """Options of models with a single stack."""

    num_layers: int = 12
    """Number of layers."""
    add_cross_attention: bool = False
    """Give each layer a cross-attention, for `encoder_hidden_states`."""

    @property
    def depths(self) -> dict[str, int]:
        """Number of layers of the stack, which is called `encoder` in every model."""
        return {"encoder": self.num_layers}


class StackModel(BaseModel):
    """Embeddings and one stack of layers, with whatever positions the configuration asks for."""

    config: StackConfig
    causal: bool
    """Whether positions see only themselves and earlier ones."""

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
                bidirectional=not self.causal,
                init_mean=config.pos_init_mean,
                init_std=config.pos_init_std,
            )
        if config.pos_bias_type == "rotary":
            self.rotary_embedding = RotaryEmbedding(config.pos_rotary_dim or config.dim_head)
        self.encoder = build(Decoder if config.add_cross_attention else Encoder, config)
        if config.cls_head is not None:
            self.cls_projection = build(Linear, config, "proj_", dim_in=config.dim_model, dim_out=config.cls_head)

    def new_cache(self, max_length: int) -> KeyValueCache:
        """An empty key-value cache for `past_key_values`, with room for `max_length` positions."""
        return KeyValueCache(self.config.num_layers, max_length)

    def run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        length: Tensor | None,
        attention_mask: Tensor | AttentionMask | None,
        *,
        position_ids: Tensor | None = None,
        token_types: tuple[Embedding, Tensor] | None = None,
        head_mask: Tensor | None = None,
        cross: tuple[Tensor | None, Tensor | AttentionMask | None] = (None, None),
        past_key_values: KeyValueCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> tuple[StackOutput, KeyValueCache | None]:
        """Embeds the input and runs the stack.

        Args:
            input_ids: (batch, seq_len) token ids; or give `inputs_embeds`.
            inputs_embeds: (batch, seq_len, dim_model).
            length: (batch,) number of real positions; or give `attention_mask`.
            attention_mask: as in `attention_mask_of`.
            position_ids: (batch, seq_len), by default counted from 0 or from the cached length.
            token_types: an embedding and the (batch, seq_len) ids of it to be added.
            head_mask: (num_layers, num_heads) or (num_heads,), factors of the heads' outputs.
            cross: hidden states (batch, encoder_len, dim_model) to attend to, and their padding mask.
            past_key_values: cache of the positions before these; it takes up these positions, too.
            use_cache: whether to make a cache where none is given.
            output_attentions: whether to return attention probabilities.
            output_hidden_states: whether to return all layers' hidden states.

        Returns:
            What the stack returns, and the cache.
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
        if token_types is not None:
            hidden_states = hidden_states + token_types[0](token_types[1])
        hidden_states = F.dropout(hidden_states, self.config.dropout_p, self.training)
        mask = attention_mask_of(length, attention_mask, shape=(batch, offset + seq_len), causal=self.causal)
        output = self.encoder(
            hidden_states,
            mask,
            self._position_bias(positions, offset, seq_len, hidden_states.dtype),
            *self._cross(cross, past_key_values, batch),
            head_mask=expanded_head_mask(head_mask, self.config.num_layers),
            cache=past_key_values,
            output_attentions=bool(output_attentions),
            output_hidden_states=bool(output_hidden_states),
        )
        return (output if isinstance(output, StackOutput) else StackOutput(output)), past_key_values

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

    def _position_bias(
        self, positions: Tensor, offset: int, seq_len: int, dtype: torch.dtype
    ) -> Tensor | RotaryPositions | None:
        if self.config.pos_bias_type == "relative":
            bias: Tensor = self.position_bias(seq_len, offset + seq_len, offset)
            return bias
        if self.config.pos_bias_type == "rotary":
            return self.rotary_embedding.positions(positions, dtype)
        return None

    def _cross(
        self, cross: tuple[Tensor | None, Tensor | AttentionMask | None], cache: KeyValueCache | None, batch: int
    ) -> tuple[Any, ...]:
        states, mask = cross
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
