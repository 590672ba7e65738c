"""The encoder skeleton: a stack with segments, a pooler over the first token, and a masked-language-model head."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from model_center.engine import Constant
from model_center.layer import ACTIVATIONS, Embedding, KeyValueCache, LayerNorm, Linear, Module, StackOutput
from model_center.model.base import build
from model_center.model.output_projection import OutputProjection
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

    def forward(self, hidden_states: Tensor, embedding: Embedding) -> OutputProjection:
        """The projection of (…, dim_model) onto the vocabulary; `embedding` is that of a tied model."""
        hidden_states = self.layer_norm(self.activation(self.dense(hidden_states)))
        if isinstance(self.decoder, Linear):
            return OutputProjection.through(self.decoder, hidden_states)
        bias = None if self.decoder is None else self.decoder.bias
        return OutputProjection.through(embedding, hidden_states, bias=bias)


class EncoderLM(StackModel):
    """An encoder; with `is_decoder` and `add_cross_attention` it is a decoder instead."""

    config: EncoderLMConfig
    heads: ClassVar[tuple[str, ...]] = ("lm_head", "pooler", "cls_projection")
    tied_output: ClassVar[str] = "lm_head.decoder.weight"

    def __init__(self, config: EncoderLMConfig) -> None:
        super().__init__(config)
        self.token_type_embedding = build(
            Embedding, config, "emb_", vocab_size=config.type_size, embedding_size=config.dim_model
        )
        self.pooler = Pooler(config)
        if config.cls_head is None:
            self.lm_head = LMHead(config)
        else:
            self.cls_projection = build(Linear, config, "proj_", dim_in=config.dim_model, dim_out=config.cls_head)

    @property
    def causal(self) -> bool:
        """Only if the configuration makes it a decoder."""
        return self.config.is_decoder

    def add_token_types(self, hidden_states: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Adds the embeddings of segments; without `token_type_ids` all is segment 0."""
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=hidden_states.device)
        added: Tensor = hidden_states + self.token_type_embedding(token_type_ids)
        return added

    def outputs(self, output: StackOutput, cache: KeyValueCache | None) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """The output object, with the pooled first token."""
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self.pooler(output.last_hidden_state),
            hidden_states=output.hidden_states,
            past_key_values=cache,
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
        )

    def output_projection_of(self, hidden_states: Tensor) -> OutputProjection:
        """That of the masked-language-model head or the classification head."""
        if self.config.cls_head is not None:
            return OutputProjection.through(self.cls_projection, hidden_states)
        projection: OutputProjection = self.lm_head(hidden_states, self.input_embedding)
        return projection
