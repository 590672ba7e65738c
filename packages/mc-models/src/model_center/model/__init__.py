"""The model families.

Each family is a module with its configuration, its model class and its weight rules; the skeletons (`encoder_lm`,
`decoder_lm`, `seq2seq`) hold what families share.
"""

from importlib.metadata import version

from model_center.model.base import BaseModel
from model_center.model.bert import Bert, BertConfig
from model_center.model.config import Config
from model_center.model.cpm1 import CPM1, CPM1Config
from model_center.model.cpm2 import CPM2, CPM2Config
from model_center.model.decoder_lm import DecoderLM
from model_center.model.encoder_lm import EncoderLM, EncoderLMConfig
from model_center.model.families import families, load_model
from model_center.model.gpt2 import GPT2, GPT2Config
from model_center.model.gptj import GPTj, GPTjConfig
from model_center.model.outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    Seq2SeqModelOutput,
)
from model_center.model.seq2seq import Seq2Seq, Seq2SeqConfig
from model_center.model.stack_model import StackConfig
from model_center.model.t5 import T5, T5Config

__version__ = version("mc-models")
__all__ = [
    "CPM1",
    "CPM2",
    "GPT2",
    "T5",
    "BaseModel",
    "BaseModelOutput",
    "BaseModelOutputWithPastAndCrossAttentions",
    "BaseModelOutputWithPoolingAndCrossAttentions",
    "Bert",
    "BertConfig",
    "CPM1Config",
    "CPM2Config",
    "Config",
    "DecoderLM",
    "EncoderLM",
    "EncoderLMConfig",
    "GPT2Config",
    "GPTj",
    "GPTjConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Seq2SeqModelOutput",
    "StackConfig",
    "T5Config",
    "__version__",
    "families",
    "load_model",
]
