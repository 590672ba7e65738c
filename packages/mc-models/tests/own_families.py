"""Tiny random models of all six families, with inputs; those of Transformers' families are made without it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model_center.model import BaseModel, families

SIZES: dict[str, Any] = {"vocab_size": 37, "dim_model": 16, "num_heads": 2, "dim_head": 8, "dim_ff": 24}
SPREAD = {"emb_init_std": 0.5, "att_init_std": 0.3, "ffn_init_std": 0.3, "proj_init_std": 0.3}
STACK = SIZES | SPREAD | {"num_layers": 2, "dropout_p": 0.0}
SEQ2SEQ = SIZES | SPREAD | {"num_encoder_layers": 2, "num_decoder_layers": 2}


@dataclass(frozen=True)
class Row:
    """A family: its options, and how it is called with a batch of ids and lengths."""

    name: str
    options: dict[str, Any]
    call: Callable[..., Any]

    def make(self, **changes: Any) -> Any:
        """A random model in evaluation mode; also what starts as a constant is random."""
        model_class = families[self.name.partition("-")[0]]
        torch.manual_seed(0)
        model: BaseModel = model_class(model_class.config_class(**{**self.options, **changes})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    @property
    def causal(self) -> bool:
        return self.name != "bert"


def stacked(model: Any, ids: Tensor, length: Tensor, **more: Any) -> Any:
    return model(ids, length, **more)


def cpm1(model: Any, ids: Tensor, length: Tensor, **more: Any) -> Any:
    nothing = torch.zeros_like(ids)
    return model(ids, length, nothing, nothing, **{"return_logits": False, **more})


def seq2seq(model: Any, ids: Tensor, length: Tensor, **more: Any) -> Any:
    """The decoder reads the batch, the encoder a fixed one."""
    source = torch.arange(1, 7, device=ids.device).expand(len(ids), -1)
    source_length = torch.full_like(length, 5)
    return model(source, source_length, ids, length, **{"return_logits": False, **more})


ROWS = [
    Row("bert", STACK | {"position_size": 20}, stacked),
    Row("bert-decoder", STACK | {"position_size": 20, "is_decoder": True}, stacked),
    Row("gpt2", STACK | {"position_size": 20}, stacked),
    Row("gptj", STACK | {"pos_rotary_dim": 4}, stacked),
    Row("t5", SEQ2SEQ, seq2seq),
    Row("cpm1", STACK, cpm1),
    Row("cpm2", SEQ2SEQ, seq2seq),
]


def batch(seed: int, lengths: list[int], width: int) -> tuple[Tensor, Tensor]:
    """Random ids (batch, width) and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 36, (len(lengths), width), generator=generator), torch.tensor(lengths)
