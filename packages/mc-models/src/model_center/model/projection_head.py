"""The head of decoders and encoder-decoders: a linear projection onto the vocabulary or onto classes."""

from typing import ClassVar

from torch import Tensor

from model_center.layer import Embedding, Linear
from model_center.model.base import BaseModel, build
from model_center.model.config import Config


class ProjectionHead(BaseModel):
    """Mixed into a skeleton that has an `input_embedding`."""

    heads: ClassVar[tuple[str, ...]] = ("output_projection", "cls_projection")
    tied_output: ClassVar[str] = "output_projection.weight"
    input_embedding: Embedding

    def add_head(self, config: Config) -> None:
        """Makes the projection that the configuration asks for."""
        if config.cls_head is not None:
            self.cls_projection = build(Linear, config, "proj_", dim_in=config.dim_model, dim_out=config.cls_head)
        elif not config.tied:
            self.output_projection = build(Linear, config, "proj_", dim_in=config.dim_model, dim_out=config.vocab_size)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Scores (batch, seq_len, vocab_size or cls_head) of hidden states (batch, seq_len, dim_model)."""
        scores: Tensor
        if self.config.cls_head is not None:
            scores = self.cls_projection(hidden_states)
            return scores
        if self.config.tied:
            scores = self.input_embedding.projection(hidden_states)
        else:
            scores = self.output_projection(hidden_states)
        if self.config.padding_ids:
            scores[..., -self.config.padding_ids :] = float("-inf")
        return scores
