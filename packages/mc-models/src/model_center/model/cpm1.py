"""CPM-1 (Zhang et al. 2020)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from model_center.layer import AttentionMask
from model_center.model.config import Published
from model_center.model.decoder_lm import DecoderLM
from model_center.model.stack_model import StackConfig


@dataclass(kw_only=True)
class CPM1Config(StackConfig):
    """Configuration of CPM-1."""

    model_type = "cpm1"
    published: ClassVar = {
        "cpm1-large": Published(
            None,
            {
                "dim_model": 2560,
                "num_heads": 32,
                "dim_head": 80,
                "dim_ff": 6400,
                "num_layers": 32,
                "position_bias_num_buckets": 64,
                "position_bias_max_distance": 256,
                "att_init_std": 1.0,
                "ffn_init_std": 1.0,
                "length_scale": True,
                "attn_scale": True,
                "tied": True,
            },
        )
    }

    vocab_size: int = 30968
    dim_ff: int = 256
    pos_bias_type: str = "relative"
    norm_eps: float = 1e-6
    proj_bias: bool = False


class CPM1(DecoderLM):
    """CPM-1: a decoder with relative positions, whose input begins with a context that is read in both directions."""

    config_class = CPM1Config

    @property
    def looks_ahead(self) -> bool:
        """Always: context sees what comes after it."""
        return True

    def forward(  # type: ignore[override] # the documented arguments
        self, input: Tensor, length: Tensor, context: Tensor, span: Tensor, **options: Any
    ) -> Any:
        """Scores the vocabulary.

        A position sees the context of its span, and if it is not context itself, what comes before it in its span.

        Args:
            input: (batch, seq_len) token ids.
            length: (batch,) number of real tokens.
            context: (batch, seq_len), whether a token belongs to the context.
            span: (batch, seq_len), number of the document in the row that a token belongs to.
            options: further arguments of `StackModel.forward`. With `past_key_values`, `length`, `context` and `span`
                count cached tokens, too.

        Returns:
            Logits (batch, seq_len, vocab_size), or (batch, seq_len, cls_head) with a classification head.
        """
        mask = AttentionMask(lengths=length, context=context.bool(), documents=span)
        return super().forward(input, attention_mask=mask, **{"return_logits": True, **options})
