"""BERT (Devlin et al. 2018)."""

from dataclasses import dataclass
from typing import ClassVar

from model_center.model.config import published_by
from model_center.model.encoder_lm import EncoderLM, EncoderLMConfig
from model_center.model.rules import Rule, Table, attention, within

_LARGE = {"dim_model": 1024, "num_heads": 16, "dim_ff": 4096, "num_layers": 24}
_SIZES = {
    "bert-base-cased": {"vocab_size": 28996},
    "bert-base-uncased": {"vocab_size": 30522},
    "bert-large-cased": {"vocab_size": 28996, **_LARGE},
    "bert-large-uncased": {"vocab_size": 30522, **_LARGE},
    "bert-base-chinese": {"vocab_size": 21128},
    "bert-base-multilingual-cased": {},
}
_ATTENTION = ("self.query", "self.key", "self.value", "output.dense")


@dataclass(kw_only=True)
class BertConfig(EncoderLMConfig):
    """Configuration of BERT."""

    model_type = "bert"
    published: ClassVar = published_by("google-bert", _SIZES, tied=True)
    huggingface: ClassVar = {
        "vocab_size": ("vocab_size", 30522),
        "type_size": ("type_vocab_size", 2),
        "position_size": ("max_position_embeddings", 512),
        "dim_model": ("hidden_size", 768),
        "num_heads": ("num_attention_heads", 12),
        "dim_ff": ("intermediate_size", 3072),
        "num_layers": ("num_hidden_layers", 12),
        "dropout_p": ("hidden_dropout_prob", 0.1),
        "att_dropout_p": ("attention_probs_dropout_prob", 0.1),
        "norm_eps": ("layer_norm_eps", 1e-12),
        "ffn_activate_fn": ("hidden_act", "gelu"),
        "tied": ("tie_word_embeddings", True),
        "is_decoder": ("is_decoder", False),
        "add_cross_attention": ("add_cross_attention", False),
    }
    huggingface_fixed: ClassVar = {"position_embedding_type": "absolute"}

    vocab_size: int = 119547
    position_size: int | None = 512
    position_bias_max_distance: int = 1024
    dropout_p: float = 0.1
    norm_bias: bool = True
    norm_eps: float = 1e-12
    att_bias: bool = True
    att_mask_value: float = -10000.0
    ffn_bias: bool = True
    ffn_activate_fn: str = "gelu"
    attn_scale: bool = True
    post_layer_norm: bool = True


class Bert(EncoderLM):
    """BERT: an encoder with post-layer-norm, trained to fill in masked tokens."""

    config_class = BertConfig

    @classmethod
    def table(cls, config: BertConfig) -> Table:
        """The rules. Post-layer-norm models keep the tree of pre-layer-norm ones: a norm is the previous output's."""
        layer, theirs, head = "encoder.layers.{i}", "encoder.layer.{i}", "cls.predictions"
        embedding = "embeddings.word_embeddings.weight"
        norms = ["attention.output.LayerNorm.*", "crossattention.output.LayerNorm.*"][: 1 + config.add_cross_attention]
        return Table(
            [
                Rule("input_embedding.weight", (embedding, f"{head}.decoder.weight")),
                Rule("position_embedding.weight", "embeddings.position_embeddings.weight"),
                Rule("token_type_embedding.weight", "embeddings.token_type_embeddings.weight"),
                Rule("encoder.layers.0.self_att.layernorm_before_attention.*", "embeddings.LayerNorm.*"),
                Rule("encoder.layers.{i+1}.self_att.layernorm_before_attention.*", f"{theirs}.output.LayerNorm.*"),
                Rule("encoder.output_layernorm.*", "encoder.layer.{last}.output.LayerNorm.*"),
                Rule(f"{layer}.cross_att.layernorm_before_attention.*", f"{theirs}.{norms[0]}"),
                Rule(f"{layer}.ffn.layernorm_before_ffn.*", f"{theirs}.{norms[-1]}"),
                Rule(f"{layer}.ffn.ffn.w_in.w.*", f"{theirs}.intermediate.dense.*"),
                Rule(f"{layer}.ffn.ffn.w_out.*", f"{theirs}.output.dense.*"),
                *attention(f"{layer}.self_att", f"{theirs}.attention", *_ATTENTION),
                *attention(f"{layer}.cross_att", f"{theirs}.crossattention", *_ATTENTION),
                *within("lm_head", f"{head}.transform", {"dense.*": "dense.*", "layer_norm.*": "LayerNorm.*"}),
                Rule("lm_head.decoder.weight", f"{head}.decoder.weight", fallback=embedding),
                Rule("lm_head.decoder.bias", f"{head}.decoder.bias", fallback=f"{head}.bias"),
                Rule("pooler.dense.*", "pooler.dense.*"),
                Rule("cls_projection.*", "classifier.*"),
            ],
            prefix="bert.",
            unprefixed=("cls.", "classifier."),
            architecture="BertLMHeadModel" if config.is_decoder else "BertForMaskedLM",
            classifier="BertForTokenClassification",
            derived=(r"embeddings\.position_ids",),
            unused=(r"cls\.seq_relationship\..*",),
            renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
        )
