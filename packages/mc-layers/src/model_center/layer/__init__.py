"""Transformer layers and blocks, with the names and defaults of ModelCenter 0.1.

They run under any engine (`model_center.engine`) and never name a device or a process. A model is built from
`Embedding`, `Encoder` and `Decoder`, or from the blocks and modules these are made of.
"""

from importlib.metadata import version

from model_center.layer.activations import ACTIVATIONS
from model_center.layer.attention import Attention
from model_center.layer.attention_mask import AttentionMask
from model_center.layer.blocks import (
    BlockOutput,
    CrossAttentionBlock,
    FFNBlock,
    SelfAttentionBlock,
    TransformerBlock,
)
from model_center.layer.cache import KeyValueCache
from model_center.layer.embedding import Embedding
from model_center.layer.feedforward import DenseACT, DenseGatedACT, FeedForward
from model_center.layer.layernorm import LayerNorm
from model_center.layer.linear import Linear
from model_center.layer.module import Module
from model_center.layer.options import (
    AttentionOptions,
    BlockOptions,
    DropoutOptions,
    FeedForwardOptions,
    NormOptions,
    PositionOptions,
    PrecisionOptions,
    ScaleOptions,
    select,
)
from model_center.layer.position import RelativePositionEmbedding, RotaryEmbedding, RotaryPositions
from model_center.layer.stack import Decoder, Encoder, StackOutput

__version__ = version("mc-layers")
__all__ = [
    "ACTIVATIONS",
    "Attention",
    "AttentionMask",
    "AttentionOptions",
    "BlockOptions",
    "BlockOutput",
    "CrossAttentionBlock",
    "Decoder",
    "DenseACT",
    "DenseGatedACT",
    "DropoutOptions",
    "Embedding",
    "Encoder",
    "FFNBlock",
    "FeedForward",
    "FeedForwardOptions",
    "KeyValueCache",
    "LayerNorm",
    "Linear",
    "Module",
    "NormOptions",
    "PositionOptions",
    "PrecisionOptions",
    "RelativePositionEmbedding",
    "RotaryEmbedding",
    "RotaryPositions",
    "ScaleOptions",
    "SelfAttentionBlock",
    "StackOutput",
    "TransformerBlock",
    "__version__",
    "select",
]
