"""GPT-J (Wang and Komatsuzaki 2021)."""

from dataclasses import dataclass
from typing import ClassVar

from model_center.model.config import Published
from model_center.model.decoder_lm import DecoderLM
from model_center.model.operations import Duplicate, FoldNormIntoBias, FoldNormIntoWeight
from model_center.model.rules import Rule, Table, attention
from model_center.model.stack_model import StackConfig


@dataclass(kw_only=True)
class GPTjConfig(StackConfig):
    """Configuration of GPT-J."""

    model_type = "gptj"
    published: ClassVar = {"gptj-6b": Published("EleutherAI/gpt-j-6b", {"ffn_activate_fn": "gelu_new"})}
    huggingface: ClassVar = {
        "vocab_size": ("vocab_size", 50400),
        "pos_rotary_dim": ("rotary_dim", 64),
        "dim_model": ("n_embd", 4096),
        "num_heads": ("n_head", 16),
        "dim_ff": ("n_inner", None),
        "num_layers": ("n_layer", 28),
        "dropout_p": ("resid_pdrop", 0.0),
        "att_dropout_p": ("attn_pdrop", 0.0),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "ffn_activate_fn": ("activation_function", "gelu_new"),
        "tied": ("tie_word_embeddings", False),
    }
    huggingface_aliases: ClassVar = {**StackConfig.huggingface_aliases, "max_position_embeddings": "n_positions"}
    huggingface_repeated: ClassVar = {"embd_pdrop": "dropout_p"}
    huggingface_carried: ClassVar = (*StackConfig.huggingface_carried, "n_positions")

    vocab_size: int = 50400
    dim_model: int = 4096
    num_heads: int = 16
    dim_head: int = 256
    dim_ff: int = 16384
    num_layers: int = 28
    pos_bias_type: str = "rotary"
    pos_rotary_dim: int | None = 64
    norm_bias: bool = True
    att_init_std: float = 0.1
    ffn_init_std: float = 0.1
    ffn_bias: bool = True
    ffn_activate_fn: str = "gelu"
    attn_scale: bool = True
    parallel_ffn: bool = True


class GPTj(DecoderLM):
    """GPT-J: a decoder with rotary positions, whose attention and feed-forward layers run side by side."""

    config_class = GPTjConfig

    @classmethod
    def table(cls, config: GPTjConfig) -> Table:  # noqa: ARG003 - all configurations have the same rules
        """The rules; one norm there is the norm before both layers here, and feed-forward layers take up the other."""
        layer = "encoder.layers.{i}"
        norms = (f"{layer}.self_att.layernorm_before_attention", f"{layer}.ffn.layernorm_before_ffn")
        scales, shifts = (tuple(f"{norm}.{part}" for norm in norms) for part in ("weight", "bias"))
        w_in, w_out, theirs = f"{layer}.ffn.ffn.w_in.w", f"{layer}.ffn.ffn.w_out", "h.{i}.mlp"
        beside_bias = (f"{w_in}.weight", *scales, *shifts)
        return Table(
            [
                Rule("input_embedding.weight", "wte.weight"),
                Rule("encoder.output_layernorm.*", "ln_f.*"),
                Rule("output_projection.weight", "lm_head.weight", fallback="wte.weight"),
                Rule("output_projection.bias", "lm_head.bias"),
                Rule(tuple(f"{norm}.*" for norm in norms), "h.{i}.ln_1.*", (Duplicate(2, made_up_for=True),)),
                *attention(f"{layer}.self_att", "h.{i}.attn", "q_proj", "k_proj", "v_proj", "out_proj"),
                Rule(f"{w_in}.weight", f"{theirs}.fc_in.weight", (FoldNormIntoWeight(),), beside=scales),
                Rule(f"{w_in}.bias", f"{theirs}.fc_in.bias", (FoldNormIntoBias(),), beside=beside_bias),
                Rule(f"{w_out}.*", f"{theirs}.fc_out.*"),
            ],
            prefix="transformer.",
            architecture="GPTJForCausalLM",
            unprefixed=("lm_head.",),
            derived=(r"h\.\d+\.attn\.((masked_)?bias|embed_positions)",),
        )
