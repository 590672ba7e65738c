"""CPM-2 (Zhang et al. 2021)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from model_center.model.config import Published
from model_center.model.seq2seq import Seq2Seq, Seq2SeqConfig

_LARGE = {
    "dim_model": 4096,
    "num_heads": 64,
    "dim_ff": 10240,
    "num_encoder_layers": 24,
    "num_decoder_layers": 24,
    "att_init_std": 1.0,
    "ffn_init_std": 1.0,
    "length_scale": True,
    "attn_scale": True,
}


@dataclass(kw_only=True)
class CPM2Config(Seq2SeqConfig):
    """Configuration of CPM-2."""

    model_type = "cpm2"
    published: ClassVar = {"cpm2-large": Published(None, _LARGE)}

    vocab_size: int = 26240
    dim_ff: int = 256


class CPM2(Seq2Seq):
    """CPM-2: an encoder-decoder with gated feed-forward layers."""

    config_class = CPM2Config

    def forward(  # type: ignore[override] # the documented arguments
        self, enc_input: Tensor, enc_length: Tensor, dec_input: Tensor, dec_length: Tensor, **options: Any
    ) -> Any:
        """Scores the vocabulary.

        Args:
            enc_input: (batch, seq_enc) token ids of the encoder's input.
            enc_length: (batch,) number of its real tokens.
            dec_input: (batch, seq_dec) token ids of the decoder's input; with `past_key_values` only the new ones.
            dec_length: (batch,) number of its real tokens, cached ones included.
            options: further arguments of `Seq2Seq.forward`.

        Returns:
            Logits (batch, seq_dec, vocab_size), or (batch, seq_dec, cls_head) with a classification head.
        """
        return super().forward(enc_input, enc_length, dec_input, dec_length, **{"return_logits": True, **options})
