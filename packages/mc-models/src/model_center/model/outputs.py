"""What the models return: dataclasses that also index and unpack as tuples, as Transformers' outputs do."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, overload

import torch

from model_center.layer import KeyValueCache


class ModelOutput:
    """Base of the outputs: absent values (None) do not count when indexing, unpacking or taking the length.

    `output.last_hidden_state`, `output["last_hidden_state"]` and `output[0]` are the same tensor.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are present, in the order of the fields."""
        return tuple(getattr(self, name) for name in self.keys())

    def keys(self) -> tuple[str, ...]:
        """The names of the values that are present."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())

    @overload
    def __getitem__(self, key: int | str) -> Any: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, key: int | str | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)


@dataclass(eq=False)
class BaseModelOutput(ModelOutput):
    """What an encoder returns.

    Attributes:
        last_hidden_state: (batch, seq_len, dim_model), after the last layer norm.
        hidden_states: one (batch, seq_len, dim_model) for the embeddings and one for each layer, the last of them
            being `last_hidden_state`; present with `output_hidden_states`.
        attentions: one (batch, num_heads, seq_len, key_len) of attention probabilities for each layer; present with
            `output_attentions`.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(eq=False)
class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """What a decoder returns.

    Attributes:
        last_hidden_state: (batch, seq_len, dim_model), after the last layer norm.
        past_key_values: the keys and values seen so far; present with `use_cache` or when a cache was given.
        hidden_states: as in `BaseModelOutput`.
        attentions: as in `BaseModelOutput`.
        cross_attentions: one (batch, num_heads, seq_len, encoder_len) for each layer; present with
            `output_attentions` in models with cross-attention.
    """

    last_hidden_state: torch.Tensor
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(eq=False)
class BaseModelOutputWithPoolingAndCrossAttentions(ModelOutput):
    """What BERT returns.

    Attributes:
        last_hidden_state: (batch, seq_len, dim_model), after the last layer norm.
        pooler_output: (batch, dim_model), a tanh layer over the first token's hidden state.
        hidden_states: as in `BaseModelOutput`.
        past_key_values: as in `BaseModelOutputWithPastAndCrossAttentions`.
        attentions: as in `BaseModelOutput`.
        cross_attentions: as in `BaseModelOutputWithPastAndCrossAttentions`.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    past_key_values: KeyValueCache | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass(eq=False)
class Seq2SeqModelOutput(ModelOutput):
    """What an encoder-decoder returns.

    Attributes:
        last_hidden_state: (batch, seq_dec, dim_model), of the decoder, after its last layer norm.
        past_key_values: as in `BaseModelOutputWithPastAndCrossAttentions`.
        decoder_hidden_states: as `hidden_states` of `BaseModelOutput`, of the decoder.
        decoder_attentions: as `attentions` of `BaseModelOutput`, of the decoder.
        cross_attentions: one (batch, num_heads, seq_dec, seq_enc) for each decoder layer.
        encoder_last_hidden_state: (batch, seq_enc, dim_model).
        encoder_hidden_states: as `hidden_states` of `BaseModelOutput`, of the encoder.
        encoder_attentions: as `attentions` of `BaseModelOutput`, of the encoder.
    """

    last_hidden_state: torch.Tensor
    past_key_values: KeyValueCache | None = None
    decoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    decoder_attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    encoder_last_hidden_state: torch.Tensor | None = None
    encoder_hidden_states: tuple[torch.Tensor, ...] | None = None
    encoder_attentions: tuple[torch.Tensor, ...] | None = None


# Engines walk through what a model returns to find the tensors that need gradients; torch walks only through
# classes that are registered.
for _output in ModelOutput.__subclasses__():
    torch.export.register_dataclass(_output)
