"""T5 (Raffel et al. 2020), also version 1.1."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from model_center.model.config import published_by
from model_center.model.rules import Rule, Table, scaled, within
from model_center.model.t5_scaling import T5Scaling, T5ScalingConfig, divisions

_24 = {"dim_model": 1024, "num_encoder_layers": 24, "num_decoder_layers": 24}
_SIZES = {
    "t5-small": {"dim_model": 512, "num_heads": 8, "dim_ff": 2048, "num_encoder_layers": 6, "num_decoder_layers": 6},
    "t5-base": {},
    "t5-large": {**_24, "num_heads": 16, "dim_ff": 4096},
    "t5-3b": {**_24, "num_heads": 32, "dim_head": 128, "dim_ff": 16384},
    "t5-11b": {**_24, "num_heads": 128, "dim_head": 128, "dim_ff": 65536},
}
_EMBEDDING_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_ATTENTION = {"project_q": "q", "project_k": "k", "project_v": "v", "attention_out": "o"}
_FEED_FORWARD = {"w_in.w": "wi", "w_in.w_0": "wi_0", "w_in.w_1": "wi_1", "w_out": "wo"}
_SELF = ("self_att.layernorm_before_attention", "self_att.self_attention", "SelfAttention", _ATTENTION)
_CROSS = ("cross_att.layernorm_before_attention", "cross_att.self_attention", "EncDecAttention", _ATTENTION)
_FFN = ("ffn.layernorm_before_ffn", "ffn.ffn", "DenseReluDense", _FEED_FORWARD)


@dataclass(kw_only=True)
class T5Config(T5ScalingConfig):
    """Configuration of T5."""

    model_type = "t5"
    published: ClassVar = published_by("google-t5", _SIZES, tied=True)
    huggingface: ClassVar = {
        "vocab_size": ("vocab_size", 32128),
        "dim_model": ("d_model", 512),
        "num_heads": ("num_heads", 8),
        "dim_head": ("d_kv", 64),
        "dim_ff": ("d_ff", 2048),
        "num_encoder_layers": ("num_layers", 6),
        "num_decoder_layers": ("num_decoder_layers", None),
        "position_bias_num_buckets": ("relative_attention_num_buckets", 32),
        "position_bias_max_distance": ("relative_attention_max_distance", 128),
        "dropout_p": ("dropout_rate", 0.1),
        "norm_eps": ("layer_norm_epsilon", 1e-6),
        "ffn_activate_fn": ("feed_forward_proj", "relu"),
        "tied": ("tie_word_embeddings", True),
        "scale_decoder_outputs": ("scale_decoder_outputs", None),
    }
    huggingface_activations: ClassVar = {
        "gated-gelu": "gated_gelu_new",
        "gated-relu": "gated_relu",
        "gated-silu": "gated_silu",
    }
    huggingface_written: ClassVar = {"decoder_start_token_id": 0}  # to turn targets into decoder inputs

    vocab_size: int = 32128
    att_init_std: float = 1
    ffn_init_std: float = 1
    ffn_activate_fn: str = "relu"

    @classmethod
    def from_huggingface(cls, theirs: Mapping[str, Any]) -> dict[str, Any]:
        """Without their own number, there are as many decoder as encoder layers."""
        options = super().from_huggingface(theirs)
        return {**options, "num_decoder_layers": options["num_decoder_layers"] or options["num_encoder_layers"]}


class T5(T5Scaling):
    """T5: an encoder-decoder with relative positions."""

    config_class = T5Config

    @classmethod
    def table(cls, config: T5Config) -> Table:
        """The rules, with the residual stream divided as the configuration says."""
        embedding, head = "shared.weight", "lm_head.weight"
        rules = [
            Rule("input_embedding.weight", (embedding, *_EMBEDDING_COPIES, head)),
            Rule("output_projection.weight", head, fallback=embedding),
        ]
        for stack, sublayers in {"encoder": (_SELF, _FFN), "decoder": (_SELF, _CROSS, _FFN)}.items():
            bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            rules.append(Rule(f"position_bias_{stack[:3]}.relative_attention_bias", bias))
            rules.append(Rule(f"{stack}.output_layernorm.weight", f"{stack}.final_layer_norm.weight"))
            for number, (norm, inner, their_inner, members) in enumerate(sublayers):
                ours, theirs = f"{stack}.layers.{{i}}", f"{stack}.block.{{i}}.layer.{number}"
                rules.append(Rule(f"{ours}.{norm}.weight", f"{theirs}.layer_norm.weight"))
                names = {f"{our}.weight": f"{their}.weight" for our, their in members.items()}
                rules += within(f"{ours}.{inner}", f"{theirs}.{their_inner}", names)
        return Table(
            scaled(rules, divisions(config, config.residual_scale or 1.0)),
            prefix="",
            architecture="T5ForConditionalGeneration",
            derived=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
        )
