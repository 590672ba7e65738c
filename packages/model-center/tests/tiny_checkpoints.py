"""Tiny random checkpoints of every family: of Transformers, of ours, and as ModelCenter 0.1 to 1.0 wrote them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from model_center.model import BaseModel, families

_GPT = {"n_embd": 24, "n_head": 3, "n_layer": 3, "n_positions": 40}
_T5 = {"d_model": 24, "num_heads": 3, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3}
_BERT = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "num_hidden_layers": 3}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
THEIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (transformers.BertConfig, transformers.BertForMaskedLM, _BERT),
    "bert-bare": (transformers.BertConfig, transformers.BertModel, _BERT),
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, _GPT),
    "gpt2-untied": (transformers.GPT2Config, transformers.GPT2LMHeadModel, _GPT | {"tie_word_embeddings": False}),
    "gptj": (transformers.GPTJConfig, transformers.GPTJForCausalLM, _GPT | {"rotary_dim": 4}),
    "t5": (transformers.T5Config, transformers.T5ForConditionalGeneration, _T5),
    "t5-gated": (transformers.T5Config, transformers.T5ForConditionalGeneration, _T5 | _GATED),
}
_OWN: dict[str, Any] = {"vocab_size": 61, "dim_model": 24, "num_heads": 3, "dim_head": 8, "dim_ff": 40}
_STACKS = {"num_encoder_layers": 2, "num_decoder_layers": 2}
OURS: dict[str, dict[str, Any]] = {
    "bert": {"num_layers": 2, "position_size": 40},
    "gpt2": {"num_layers": 2, "position_size": 40},
    "gptj": {"num_layers": 2, "pos_rotary_dim": 4},
    "t5": _STACKS,
    "cpm1": {"num_layers": 2},
    "cpm2": _STACKS,
}


def write_theirs(name: str, directory: Path, *, shard: str = "5GB", **changes: Any) -> Path:
    """Write a random model of Transformers, all of whose parameters count."""
    config_class, model_class, options = THEIRS[name]
    model = model_class(config_class(**{"vocab_size": 61, **options, **changes}))
    _randomize(model)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def make_ours(family: str, **changes: Any) -> BaseModel:
    """A random model of ours, all of whose parameters count."""
    model_class = families[family]
    model = model_class(model_class.config_class(**{**_OWN, **OURS[family], **changes}))
    _randomize(model)
    return model.eval()


def write_legacy(family: str, directory: Path, **changes: Any) -> Path:
    """Write a random model as ModelCenter 0.1 to 1.0 did."""
    return save_legacy(make_ours(family, **changes), directory)


def save_legacy(model: BaseModel, directory: Path) -> Path:
    """Write a model as ModelCenter 0.1 to 1.0 did, which does not say which family it is."""
    directory.mkdir()
    torch.save(model.state_dict(), directory / "pytorch_model.pt")
    options = {
        name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "format_version")
    }
    (directory / "config.json").write_text(json.dumps(options))
    return directory


def change_json(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + is_norm)
