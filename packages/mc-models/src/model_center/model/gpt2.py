"""GPT-2 (Radford et al. 2019)."""

from dataclasses import dataclass
from typing import ClassVar

from model_center.model.config import Published, published_by
from model_center.model.decoder_lm import DecoderLM
from model_center.model.operations import PadRows, Split, Transpose
from model_center.model.rules import Rule, Table
from model_center.model.stack_model import StackConfig, StackModel

_GELU = {"ffn_activate_fn": "gelu_new"}
_SIZES = {
    "gpt2-medium": {"dim_model": 1024, "num_heads": 16, "dim_ff": 4096, "num_layers": 24},
    "gpt2-large": {"dim_model": 1280, "num_heads": 20, "dim_ff": 5120, "num_layers": 36},
    "gpt2-xl": {"dim_model": 1600, "num_heads": 25, "dim_ff": 6400, "num_layers": 48},
}


@dataclass(kw_only=True)
class GPT2Config(StackConfig):
    """Configuration of GPT-2."""

    model_type = "gpt2"
    published: ClassVar = {
        "gpt2-base": Published("openai-community/gpt2", _GELU),
        **published_by("openai-community", _SIZES, **_GELU),
    }
    huggingface: ClassVar = {
        "vocab_size": ("vocab_size", 50257),
        "position_size": ("n_positions", 1024),
        "dim_model": ("n_embd", 768),
        "num_heads": ("n_head", 12),
        "dim_ff": ("n_inner", None),
        "num_layers": ("n_layer", 12),
        "dropout_p": ("resid_pdrop", 0.1),
        "att_dropout_p": ("attn_pdrop", 0.1),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "attn_scale": ("scale_attn_weights", True),
        "ffn_activate_fn": ("activation_function", "gelu_new"),
        "tied": ("tie_word_embeddings", True),
        "add_cross_attention": ("add_cross_attention", False),
    }
    huggingface_repeated: ClassVar = {"embd_pdrop": "dropout_p"}
    huggingface_fixed: ClassVar = {"scale_attn_by_inverse_layer_idx": False}
    huggingface_untied: ClassVar = {"proj_bias": False}
    padding_ids = 1

    vocab_size: int = 50258
    position_size: int | None = 1024
    dropout_p: float = 0.1
    norm_bias: bool = True
    att_bias: bool = True
    att_mask_value: float = -10000.0
    ffn_bias: bool = True
    ffn_activate_fn: str = "gelu"
    attn_scale: bool = True
    half: bool = False
    tied: bool = True


class GPT2(DecoderLM):
    """GPT-2: a pre-layer-norm decoder with learnt positions."""

    config_class = GPT2Config
    forward = StackModel.forward  # type: ignore[assignment] # the documented arguments include cross-attention

    @classmethod
    def table(cls, config: GPT2Config) -> Table:
        """The rules; their matrices are transposed, and one of them holds queries, keys and values."""
        layer, flip, padding = "encoder.layers.{i}", (Transpose(),), (PadRows(config.padding_ids),)
        own, cross = f"{layer}.self_att.self_attention", f"{layer}.cross_att.self_attention"
        q, k, v = "project_q.*", "project_k.*", "project_v.*"
        return Table(
            [
                Rule("input_embedding.weight", ("wte.weight", "lm_head.weight"), padding),
                Rule("output_projection.weight", "lm_head.weight", padding, fallback="wte.weight"),
                Rule("cls_projection.*", "classifier.*"),
                Rule("position_embedding.weight", "wpe.weight"),
                Rule("encoder.output_layernorm.*", "ln_f.*"),
                Rule(f"{layer}.self_att.layernorm_before_attention.*", "h.{i}.ln_1.*"),
                Rule(f"{layer}.cross_att.layernorm_before_attention.*", "h.{i}.ln_cross_attn.*"),
                Rule(f"{layer}.ffn.layernorm_before_ffn.*", "h.{i}.ln_2.*"),
                Rule(f"{layer}.ffn.ffn.w_in.w.*", "h.{i}.mlp.c_fc.*", flip),
                Rule(f"{layer}.ffn.ffn.w_out.*", "h.{i}.mlp.c_proj.*", flip),
                Rule((f"{own}.{q}", f"{own}.{k}", f"{own}.{v}"), "h.{i}.attn.c_attn.*", (*flip, Split(3))),
                Rule(f"{own}.attention_out.*", "h.{i}.attn.c_proj.*", flip),
                Rule(f"{cross}.{q}", "h.{i}.crossattention.q_attn.*", flip),
                Rule((f"{cross}.{k}", f"{cross}.{v}"), "h.{i}.crossattention.c_attn.*", (*flip, Split(2))),
                Rule(f"{cross}.attention_out.*", "h.{i}.crossattention.c_proj.*", flip),
            ],
            prefix="transformer.",
            architecture="GPT2LMHeadModel",
            classifier="GPT2ForTokenClassification",
            unprefixed=("lm_head.", "classifier."),
            derived=(r"h\.\d+\.(attn|crossattention)\.(masked_)?bias",),
        )
