"""The encoder skeleton: a stack with segments, a pooler over the first token, and a masked-language-model head."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from model_center.engine import Constant
from model_center.layer import ACTIVATIONS, AttentionMask, Embedding, KeyValueCache, LayerNorm, Linear, Module
from model_center.model.base import build
from model_center.model.outputs import BaseModelOutputWithPoolingAndCrossAttentions
from model_center.model.stack_model import StackConfig, StackModel


@dataclass(kw_only=True)
class EncoderLMConfig(StackConfig):
    """Options of encoders."""

    type_size: int = 2
    """Number of segments that `token_type_ids` tell apart."""
    is_decoder: bool = False
    """Let positions see only themselves and earlier ones."""


def _square(config: EncoderLMConfig) -> Linear:
    return build(Linear, config, "ffn_", dim_in=config.dim_model, dim_out=config.dim_model, bias=True)


class Pooler(Module):
    """One vector for a sequence: a tanh layer over the first token's hidden state."""

    def __init__(self, config: EncoderLMConfig) -> None:
        self.dense = _square(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Pools (batch, seq_len, dim_model) to (batch, dim_model)."""
        return torch.tanh(self.dense(hidden_states[:, 0]))


class OutputBias(Module):
    """The bias of an output projection whose weight is the input embedding."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.bias = self.parameter(size, dtype=dtype, init=Constant(0.0))


class LMHead(Module):
    """Scores of the vocabulary: dense layer, activation, layer norm and projection."""

    def __init__(self, config: EncoderLMConfig) -> None:
        self.dense = _square(config)
        self.activation = ACTIVATIONS[config.ffn_activate_fn.removeprefix("gated_")]()
        self.layer_norm = build(LayerNorm, config, "norm_", dim_norm=config.dim_model)
        self.decoder: Linear | OutputBias | None = None
        if not config.tied:
            self.decoder = build(Linear, config, "proj_", dim_in=config.dim_model, dim_out=config.vocab_size)
        elif config.proj_bias:
            self.decoder = OutputBias(config.vocab_size, config.dtype)

    def forward(self, hidden_states: Tensor, embedding: Embedding) -> Tensor:
        """Scores (batch, seq_len, dim_model) against the vocabulary; `embedding` is the projection of a tied model."""
        hidden_states = self.layer_norm(self.activation(self.dense(hidden_states)))
        if isinstance(self.decoder, Linear):
            logits: Tensor = self.decoder(hidden_states)
            return logits
        logits = embedding.projection(hidden_states)
        return logits if self.decoder is None else logits + self.decoder.bias


class EncoderLM(StackModel):
    """An encoder; with `is_decoder` and `add_cross_attention` it is a decoder instead."""

    config: EncoderLMConfig
    heads: ClassVar[tuple[str, ...]] = ("lm_head", "pooler", "cls_projection")
    tied_output: ClassVar[str] = "lm_head.decoder.weight"

    def __init__(self, config: EncoderLMConfig) -> None:
        self.causal = config.is_decoder
        super().__init__(config)
        self.token_type_embedding = build(
            Embedding, config, "emb_", vocab_size=config.type_size, embedding_size=config.dim_model
        )
        self.pooler = Pooler(config)
        if config.cls_head is None:
            self.lm_head = LMHead(config)

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
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...] | Tensor:
        """Runs the model.

        Args:
            input_ids: (batch, seq_len) token ids.
            length: (batch,) number of real tokens, the rest being padding on the right.
            attention_mask: (batch, seq_len), 0 at padding; (batch, seq_len, seq_len), 0 where attention is not
                allowed; or an `AttentionMask`. Without it and `length` nothing is padding.
            token_type_ids: (batch, seq_len) segments, by default 0.
            position_ids: (batch, seq_len), by default counted from 0.
            head_mask: (num_layers, num_heads) or (num_heads,), what each head's output is multiplied by.
            inputs_embeds: (batch, seq_len, dim_model) instead of `input_ids`.
            encoder_hidden_states: (batch, encoder_len, dim_model) for cross-attention.
            encoder_attention_mask: (batch, encoder_len), 0 at the encoder's padding.
            output_attentions: return attention probabilities, too.
            output_hidden_states: return the hidden states of all layers, too.
            return_dict: return an output object rather than a plain tuple.
            return_logits: return only the logits.
            past_key_values: keys and values of earlier tokens (`is_decoder` only); takes up those of these.
            use_cache: make and return `past_key_values` where none is given.

        Returns:
            `BaseModelOutputWithPoolingAndCrossAttentions`, a tuple of its values, or with `return_logits` the logits
            (batch, seq_len, vocab_size), or (batch, seq_len, cls_head) with a classification head.
        """
        if token_type_ids is None:
            device = self.encoder.output_layernorm.weight.device
            token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        output, cache = self.run(
            input_ids,
            inputs_embeds,
            length,
            attention_mask,
            position_ids=position_ids,
            token_types=(self.token_type_embedding, token_type_ids),
            head_mask=head_mask,
            cross=(encoder_hidden_states, encoder_attention_mask),
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        if return_logits:
            return self.logits(output.last_hidden_state)
        outputs = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self.pooler(output.last_hidden_state),
            hidden_states=output.hidden_states,
            past_key_values=cache,
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
        )
        return outputs if return_dict else outputs.to_tuple()

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Scores of the head for hidden states (batch, seq_len, dim_model)."""
        scores: Tensor
        if self.config.cls_head is None:
            scores = self.lm_head(hidden_states, self.input_embedding)
        else:
            scores = self.cls_projection(hidden_states)
        return scores
