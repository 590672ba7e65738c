"""One row for each family that Transformers has: how to make a tiny random model of it there, and inputs for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from comparison import Inputs
from torch import Tensor

from model_center.model import BaseModel, families

VOCABULARY = 61
BERT = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "num_hidden_layers": 2}
GPT = {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 40}
T5_SIZES = {"d_model": 24, "num_heads": 3, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3}
DECODER = {"is_decoder": True, "add_cross_attention": True}


@dataclass(frozen=True)
class Family:
    """A model of Transformers and its counterpart here.

    Attributes:
        name: for test ids.
        config: Transformers' configuration class.
        options: what it is made with.
        theirs: Transformers' class with a head.
        untied: whether the output projection differs from the embedding, although Transformers calls them tied.
    """

    name: str
    config: Any
    options: dict[str, Any]
    theirs: Any
    untied: bool = False

    @property
    def model(self) -> type[BaseModel]:
        """Our class."""
        return families[self.config.model_type]

    @property
    def is_seq2seq(self) -> bool:
        return "num_decoder_layers" in self.options

    @property
    def crossed(self) -> bool:
        return "add_cross_attention" in self.options

    def make(self, seed: int = 0, **changes: Any) -> Any:
        """A random model in evaluation mode, all of whose parameters count."""
        config = self.config(**{"vocab_size": VOCABULARY, **self.options, **changes})
        config._attn_implementation = "eager"
        model = self.theirs(config).eval()
        generator = torch.Generator().manual_seed(seed)
        if self.untied:
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_norm = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + is_norm)
        return model

    def make_both(self, directory: Path, **changes: Any) -> tuple[Any, Any]:
        """Transformers' random model, and ours with its weights."""
        theirs = self.make(**changes)
        theirs.save_pretrained(directory)
        return theirs, self.model.from_pretrained(directory)

    def inputs(self, padding: str = "right", seed: int = 1) -> Inputs:
        """A ragged batch, padded on the right or on the left."""
        generator = torch.Generator().manual_seed(seed)

        def ids(length: int) -> Tensor:
            return torch.randint(1, VOCABULARY, (3, length), generator=generator)

        def mask(length: int) -> Tensor:
            real = torch.arange(length) < torch.tensor([[length], [length - 3], [4]])
            return (real if padding == "right" else real.flip(1)).long()

        inputs = {"input_ids": ids(11), "attention_mask": mask(11)}
        if self.is_seq2seq:
            inputs |= {"decoder_input_ids": ids(7), "decoder_attention_mask": mask(7)}
        if self.crossed:
            states = torch.randn(3, 6, 24, generator=generator)
            inputs |= {"encoder_hidden_states": states, "encoder_attention_mask": mask(6)}
        return inputs


def _tie(tie: bool) -> dict[str, Any]:
    return {"tie_word_embeddings": tie}


FAMILIES = [
    Family("bert", transformers.BertConfig, BERT, transformers.BertForMaskedLM),
    Family("bert-untied", transformers.BertConfig, BERT | _tie(False), transformers.BertForMaskedLM),
    Family("bert-decoder", transformers.BertConfig, BERT | DECODER, transformers.BertLMHeadModel),
    Family("gpt2", transformers.GPT2Config, GPT, transformers.GPT2LMHeadModel),
    Family("gpt2-untied", transformers.GPT2Config, GPT | _tie(False), transformers.GPT2LMHeadModel),
    Family("gpt2-crossed", transformers.GPT2Config, GPT | DECODER, transformers.GPT2LMHeadModel),
    Family("gptj", transformers.GPTJConfig, GPT | {"rotary_dim": 4}, transformers.GPTJForCausalLM),
    Family("t5", transformers.T5Config, T5_SIZES, transformers.T5ForConditionalGeneration),
    Family(
        "t5-v1.1",
        transformers.T5Config,
        T5_SIZES | {"feed_forward_proj": "gated-gelu"} | _tie(False),
        transformers.T5ForConditionalGeneration,
        untied=True,
    ),
    Family("t5-untied", transformers.T5Config, T5_SIZES, transformers.T5ForConditionalGeneration, untied=True),
]
