"""The model families."""

from importlib.metadata import version

from model_center.model.base import BaseModel
from model_center.model.bert import Bert, BertConfig
from model_center.model.config import Config
from model_center.model.families import families, load_model
from model_center.model.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    Seq2SeqModelOutput,
)

__version__ = version("mc-models")
__all__ = [
    "BaseModel",
    "BaseModelOutput",
    "BaseModelOutputWithPastAndCrossAttentions",
    "BaseModelOutputWithPoolingAndCrossAttentions",
    "Bert",
    "BertConfig",
    "Config",
    "Seq2SeqModelOutput",
    "__version__",
    "families",
    "load_model",
]
