"""The encoder-decoder skeleton: two stacks with relative positions, one embedding, an output projection."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from model_center.layer import (
    AttentionMask,
    Decoder,
    Embedding,
    Encoder,
    KeyValueCache,
    RelativePositionEmbedding,
    StackOutput,
)
from model_center.model.base import build
from model_center.model.config import Config
from model_center.model.inputs import attention_mask_of, embedded, expanded_head_mask
from model_center.model.outputs import BaseModelOutput, Seq2SeqModelOutput
from model_center.model.projection_head import ProjectionHead

EncoderOutputs = Tensor | BaseModelOutput | StackOutput | tuple[Tensor, ...]


@dataclass(kw_only=True)
class Seq2SeqConfig(Config):
    """Options of encoder-decoders."""

    huggingface_aliases: ClassVar = {**Config.huggingface_aliases, "num_hidden_layers": "num_encoder_layers"}

    num_encoder_layers: int = 12
    """Layers of the encoder."""
    num_decoder_layers: int = 12
    """Layers of the decoder."""
    pos_bias_type: str = "relative"
    norm_eps: float = 1e-6
    proj_bias: bool = False

    @property
    def depths(self) -> dict[str, int]:
        """Number of layers of both stacks."""
        return {"encoder": self.num_encoder_layers, "decoder": self.num_decoder_layers}


class Seq2Seq(ProjectionHead):
    """An encoder, and a decoder that attends to what it returns."""

    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config)
        self.input_embedding = build(Embedding, config, "emb_", embedding_size=config.dim_model)
        if config.pos_bias_type == "relative":
            self.position_bias_enc = _positions(config, bidirectional=True)
            self.position_bias_dec = _positions(config, bidirectional=False)
        elif config.pos_bias_type != "none":
            raise ValueError(f"`pos_bias_type` must be 'relative' or 'none' here, but is {config.pos_bias_type!r}")
        norm_eps = self.stack_norm_eps
        self.encoder = build(Encoder, config, num_layers=config.num_encoder_layers, norm_eps=norm_eps)
        self.decoder = build(Decoder, config, num_layers=config.num_decoder_layers, norm_eps=norm_eps)
        self.add_head(config)

    def new_cache(self, max_length: int) -> KeyValueCache:
        """An empty key-value cache for `past_key_values`, with room for `max_length` decoder positions."""
        return KeyValueCache(self.config.num_decoder_layers, max_length)

    @property
    def stack_norm_eps(self) -> float:
        """What the stacks' norms add to the variance."""
        return self.config.norm_eps

    def forward(
        self,
        input_ids: Tensor | None = None,
        length: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_length: Tensor | None = None,
        attention_mask: Tensor | AttentionMask | None = None,
        decoder_attention_mask: Tensor | AttentionMask | None = None,
        head_mask: Tensor | None = None,
        decoder_head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        encoder_outputs: EncoderOutputs | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
        return_logits: bool = False,
        *,
        past_key_values: KeyValueCache | None = None,
        use_cache: bool | None = None,
    ) -> Seq2SeqModelOutput | tuple[Any, ...] | Tensor:
        """Runs the model.

        Args:
            input_ids: (batch, seq_enc) token ids of the encoder's input.
            length: (batch,) number of its real tokens, the rest being padding on the right.
            decoder_input_ids: (batch, seq_dec) token ids of the decoder's input; with `past_key_values` only new ones.
            decoder_length: (batch,) number of its real tokens, cached ones included.
            attention_mask: (batch, seq_enc), 0 at padding, instead of `length`; (batch, seq_enc, seq_enc), 0 where the
                encoder's attention is not allowed; or an `AttentionMask`. Without both nothing is padding.
            decoder_attention_mask: (batch, total), 0 at padding, where total counts cached tokens, too; or a dense one
                or an `AttentionMask`, with `documents` if the encoder's has them. The decoder sees earlier positions
                only, in any case.
            head_mask: (num_encoder_layers, num_heads) or (num_heads,), factors of the encoder's heads; None where the
                encoder is not run.
            decoder_head_mask: (num_decoder_layers, num_heads) or (num_heads,), factors of the decoder's heads.
            cross_attn_head_mask: likewise for the heads of its cross-attention.
            encoder_outputs: the encoder's hidden states (batch, seq_enc, dim_model), or an output object or tuple of
                which they are the first value; the encoder is then not run. `length` or `attention_mask` still say
                what is padding.
            inputs_embeds: (batch, seq_enc, dim_model) instead of `input_ids`.
            decoder_inputs_embeds: (batch, seq_dec, dim_model) instead of `decoder_input_ids`.
            output_attentions: return attention probabilities, too.
            output_hidden_states: return the hidden states of all layers, too.
            return_dict: return an output object rather than a plain tuple.
            return_logits: return only the logits.
            past_key_values: keys and values of earlier decoder tokens, and of the encoder's output, which then need
                not be given again; takes up those of these.
            use_cache: make and return `past_key_values` where none is given.

        Returns:
            `Seq2SeqModelOutput`, a tuple of its values, or with `return_logits` the logits
            (batch, seq_dec, vocab_size), or (batch, seq_dec, cls_head) with a classification head.
        """
        more = {"output_attentions": bool(output_attentions), "output_hidden_states": bool(output_hidden_states)}
        if encoder_outputs is None:
            encoded = self._encode(past_key_values, input_ids, inputs_embeds, length, attention_mask, head_mask, **more)
        elif input_ids is None and inputs_embeds is None:
            encoded = _as_stack_output(encoder_outputs)
        else:
            raise ValueError("give `encoder_outputs` or the encoder's input, not both")
        if head_mask is not None and (encoder_outputs is not None or encoded is None):
            raise ValueError("`head_mask` must be None where the encoder is not run, because its output is at hand")
        hidden_states = embedded(self.input_embedding, decoder_input_ids, decoder_inputs_embeds, "decoder_")
        batch, seq_len = hidden_states.shape[:2]
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache(2 * seq_len)
        offset, cross_length = (
            (0, 0) if past_key_values is None else (past_key_values.length, past_key_values.cross_length)
        )
        mask = attention_mask_of(
            decoder_length, decoder_attention_mask, shape=(batch, offset + seq_len), causal=True, prefix="decoder_"
        )
        cross_states = None if encoded is None else encoded.last_hidden_state
        cross_shape = (batch, cross_length if cross_states is None else cross_states.shape[1])
        decoded = _as_stack_output(
            self.decoder(
                F.dropout(hidden_states, self.config.dropout_p, self.training),
                mask,
                self._position_bias("position_bias_dec", seq_len, offset),
                cross_states,
                _cross_mask(attention_mask_of(length, attention_mask, shape=cross_shape), mask, offset),
                head_mask=expanded_head_mask(decoder_head_mask, self.config.num_decoder_layers),
                cross_head_mask=expanded_head_mask(cross_attn_head_mask, self.config.num_decoder_layers),
                cache=past_key_values,
                **more,
            )
        )
        last_hidden_state = F.dropout(decoded.last_hidden_state, self.config.dropout_p, self.training)
        if return_logits:
            return self.logits(last_hidden_state)
        outputs = Seq2SeqModelOutput(
            last_hidden_state=last_hidden_state,
            past_key_values=past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=cross_states,
            encoder_hidden_states=None if encoded is None else encoded.hidden_states,
            encoder_attentions=None if encoded is None else encoded.attentions,
        )
        return outputs if return_dict else outputs.to_tuple()

    def _encode(
        self,
        cache: KeyValueCache | None,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        length: Tensor | None,
        attention_mask: Tensor | AttentionMask | None,
        head_mask: Tensor | None,
        **more: bool,
    ) -> StackOutput | None:
        """What the encoder returns; None if there is no input because the cache holds what the decoder needs of it."""
        if input_ids is None and inputs_embeds is None and cache is not None and cache.cross_length:
            return None
        hidden_states = embedded(self.input_embedding, input_ids, inputs_embeds)
        batch, seq_len = hidden_states.shape[:2]
        encoded = _as_stack_output(
            self.encoder(
                F.dropout(hidden_states, self.config.dropout_p, self.training),
                attention_mask_of(length, attention_mask, shape=(batch, seq_len)),
                self._position_bias("position_bias_enc", seq_len),
                head_mask=expanded_head_mask(head_mask, self.config.num_encoder_layers),
                **more,
            )
        )
        last_hidden_state = F.dropout(encoded.last_hidden_state, self.config.dropout_p, self.training)
        return replace(encoded, last_hidden_state=last_hidden_state)

    def _position_bias(self, name: str, seq_len: int, offset: int = 0) -> Tensor | None:
        if self.config.pos_bias_type == "none":
            return None
        bias: Tensor = getattr(self, name).by_distance(seq_len, offset + seq_len, offset)
        return bias


def _positions(config: Seq2SeqConfig, bidirectional: bool) -> RelativePositionEmbedding:
    return build(
        RelativePositionEmbedding,
        config,
        "position_bias_",
        bidirectional=bidirectional,
        init_mean=config.pos_init_mean,
        init_std=config.pos_init_std,
    )


def _as_stack_output(outputs: EncoderOutputs) -> StackOutput:
    """The encoder's outputs in whatever form: hidden states, an output object, or a tuple."""
    if isinstance(outputs, StackOutput):
        return outputs
    if isinstance(outputs, BaseModelOutput):
        return StackOutput(outputs.last_hidden_state, outputs.hidden_states, outputs.attentions)
    return StackOutput(outputs if isinstance(outputs, Tensor) else outputs[0])


def _cross_mask(encoder_mask: AttentionMask, decoder_mask: AttentionMask, offset: int) -> AttentionMask:
    """What the decoder may attend to of the encoder's positions: those that are real, and of the same document."""
    documents, of_queries = encoder_mask.documents, decoder_mask.documents
    if documents is not None and of_queries is None:
        raise ValueError("`decoder_attention_mask` must have `documents`, because `attention_mask` has, but has none")
    return AttentionMask(
        lengths=encoder_mask.lengths,
        key_padding=encoder_mask.key_padding,
        documents=documents,
        query_documents=None if documents is None or of_queries is None else of_queries[:, offset:],
    )
