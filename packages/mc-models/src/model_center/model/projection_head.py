"""The head of decoders and encoder-decoders: a linear projection onto the vocabulary or onto classes."""

from typing import ClassVar

from torch import Tensor

from model_center.layer import Embedding, Linear
from model_center.model.base import BaseModel, build
from model_center.model.config import Config
from model_center.model.output_projection import OutputProjection


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

    def output_projection_of(self, hidden_states: Tensor) -> OutputProjection:
        """The classification head, the output projection, or that onto the tied embedding."""
        if self.config.cls_head is not None:
            return OutputProjection.through(self.cls_projection, hidden_states)
        layer = self.input_embedding if self.config.tied else self.output_projection
        return OutputProjection.through(layer, hidden_states, padding_ids=self.config.padding_ids)
