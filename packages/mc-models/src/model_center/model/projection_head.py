"""The head of decoders and encoder-decoders: a linear projection onto the vocabulary or onto classes."""

from typing import Any, ClassVar

from torch import Tensor

from model_center.layer import Embedding, Linear
from model_center.model.base import BaseModel, Stored, build
from model_center.model.config import Config
from model_center.model.output_projection import OutputProjection
from model_center.model.rules import expand


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

    @classmethod
    def fit(cls, config: Any, stored: Stored) -> Any:
        """As in all models.

        Raises:
            ValueError: the tied model of a Transformers checkpoint has an output bias, which none has here.
        """
        config = super().fit(config, stored)
        table = cls.table(config) if stored.is_foreign and config.tied and config.cls_head is None else None
        if table is None:
            return config
        rows = expand(table.rules, config.depths)
        biases = {name for row in rows if row.ours == ("output_projection.bias",) for name in row.theirs}
        for name in stored.weights.names():
            if table.canonical(name) in biases and stored.weights.read(name).any():
                raise ValueError(
                    f"`{name}` of {stored.weights.path} must be 0 in a tied {cls.__name__}, which has no output bias "
                    f"here, but is not; pass a `config` with `tied=False`, which loads it exactly"
                )
        return config

    def output_projection_of(self, hidden_states: Tensor) -> OutputProjection:
        """The classification head, the output projection, or that onto the tied embedding."""
        if self.config.cls_head is not None:
            return OutputProjection.through(self.cls_projection, hidden_states)
        layer = self.input_embedding if self.config.tied else self.output_projection
        return OutputProjection.through(layer, hidden_states, padding_ids=self.config.padding_ids)
