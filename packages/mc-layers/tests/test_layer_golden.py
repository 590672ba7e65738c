"""Stacks against outputs of the original system, with its weights (see the shared folder's golden files)."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from model_center.layer import AttentionMask, Decoder, Encoder, RelativePositionEmbedding, RotaryEmbedding, select

Inputs = dict[str, Tensor]


class Golden:
    """One golden model: its configuration, weights, inputs and outputs."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.config["att_mask_value"] = float(self.config["att_mask_value"])
        self.weights = torch.load(folder / "pytorch_model.pt", weights_only=True)
        self.dtype = self.weights["input_embedding.weight"].dtype
        record = torch.load(folder / "golden.pt", weights_only=True)
        self.inputs: Inputs = record["inputs"]
        self.logits, self.extra, self.valid = record["logits"], record["extra"], record["valid"].bool()

    def load(self, name: str, module: torch.nn.Module) -> Any:
        prefix = f"{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)})
        return module.requires_grad_(False)

    def stack(self, name: str, **given: Any) -> Any:
        made = Decoder if name == "decoder" else Encoder
        options = SimpleNamespace(**self.config, dtype=self.dtype)
        return self.load(name, made(**select(made, options, **given)))

    def bias(self, name: str, length: int, bidirectional: bool) -> Tensor:
        layer = RelativePositionEmbedding(self.config["num_heads"], bidirectional=bidirectional, dtype=self.dtype)
        bias: Tensor = self.load(name, layer)(length, length)
        return bias

    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.weights["input_embedding.weight"][ids]
        return embedded


def bert(golden: Golden) -> Tensor:
    ids = golden.inputs["input_ids"]
    x = golden.embed(ids) + golden.weights["position_embedding.weight"][: ids.shape[1]]
    x = x + golden.weights["token_type_embedding.weight"][golden.inputs["token_type_ids"]]
    output: Tensor = golden.stack("encoder")(x, AttentionMask(key_padding=golden.inputs["attention_mask"] == 0))
    return output


def gpt2(golden: Golden) -> Tensor:
    ids = golden.inputs["input_ids"]
    x = golden.embed(ids) + golden.weights["position_embedding.weight"][: ids.shape[1]]
    mask = AttentionMask(causal=True, lengths=golden.inputs["attention_mask"].sum(1))
    output: Tensor = golden.stack("encoder")(x, mask)
    return output


def gptj(golden: Golden) -> Tensor:
    mask = AttentionMask(causal=True, lengths=golden.inputs["attention_mask"].sum(1))
    rotary = RotaryEmbedding(golden.config["pos_rotary_dim"])
    # The original's model sets this one; its configuration does not have it.
    stack = golden.stack("encoder", parallel_ffn=True)
    output: Tensor = stack(golden.embed(golden.inputs["input_ids"]), mask, rotary)
    return output


def seq2seq(golden: Golden, source: str, target: str, source_real: Tensor, target_real: Tensor) -> Tensor:
    ids, target_ids = golden.inputs[source], golden.inputs[target]
    source_mask = AttentionMask(key_padding=~source_real)
    encoder = golden.stack("encoder", num_layers=golden.config["num_encoder_layers"])
    encoded = encoder(golden.embed(ids), source_mask, golden.bias("position_bias_enc", ids.shape[1], True))
    decoder = golden.stack("decoder", num_layers=golden.config["num_decoder_layers"])
    bias = golden.bias("position_bias_dec", target_ids.shape[1], False)
    mask = AttentionMask(causal=True, key_padding=~target_real)
    output: Tensor = decoder(golden.embed(target_ids), mask, bias, encoded, source_mask)
    return output


def t5(golden: Golden) -> Tensor:
    real, target_real = (golden.inputs[name].bool() for name in ("attention_mask", "decoder_attention_mask"))
    return seq2seq(golden, "input_ids", "decoder_input_ids", real, target_real)


def cpm2(golden: Golden) -> Tensor:
    real, target_real = (
        torch.arange(golden.inputs[f"{side}_input"].shape[1]) < golden.inputs[f"{side}_length"][:, None]
        for side in ("enc", "dec")
    )
    return seq2seq(golden, "enc_input", "dec_input", real, target_real)


def cpm1(golden: Golden) -> Tensor:
    inputs = golden.inputs
    mask = AttentionMask(lengths=inputs["length"], context=inputs["context"], documents=inputs["span"])
    bias = golden.bias("position_bias", inputs["input"].shape[1], True)
    output: Tensor = golden.stack("encoder")(golden.embed(inputs["input"]), mask, bias)
    return output


FAMILIES: list[Callable[[Golden], Tensor]] = [bert, gpt2, gptj, t5, cpm1, cpm2]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-2)])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_stacks(family: Callable[[Golden], Tensor], precision: str, tolerance: float, shared_dir: Path) -> None:
    golden = Golden(shared_dir / "golden" / "models" / f"{family.__name__}_{precision}")
    output = family(golden)
    expected = golden.extra.get("last_hidden_state")
    if expected is None:
        output, expected = output @ golden.weights["output_projection.weight"].T, golden.logits
    output, expected = output[golden.valid].float(), expected[golden.valid].float()
    assert_close(output, expected, rtol=0.0, atol=tolerance * expected.abs().max().item())
