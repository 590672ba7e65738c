"""Constructors and forwards have the documented names and defaults.

`documented_layers.json` was extracted from sections 1.12 and 1.13 of the ModelCenter 0.1 documentation; `notes` there
say where the document contradicts itself. What we add is listed here, with the reason.
"""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest

import model_center.layer
from model_center.engine import HALF

DOCUMENTED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "documented_layers.json").read_text(encoding="utf-8")
)

# Blocks and stacks have these options documented; the modules inside them therefore need them too.
SCALE = {"length_scale": "blocks pass it on"}
INT8 = {"int8": "blocks pass it on"}
HEADS_KV = {"num_heads_kv": "grouped-query attention"}
ATT_DROPOUT = {"att_dropout_p": "models differ in where they drop"}
FFN_DROPOUT = {"ffn_dropout_p": "models differ in where they drop"}
BLOCK = HEADS_KV | ATT_DROPOUT | FFN_DROPOUT

ADDED: dict[str, dict[str, str]] = {
    "Linear": SCALE | INT8,
    "Embedding": SCALE
    | INT8
    | {
        "dtype": "cut off in the document",
        "init_mean": "cut off in the document",
        "init_std": "cut off in the document",
    },
    "RelativePositionEmbedding": {},
    "RotaryEmbedding": {},
    "LayerNorm": {},
    "Attention": SCALE | INT8 | HEADS_KV | {"dropout_p": "blocks pass it on"},
    "FeedForward": SCALE | INT8,
    "Encoder": BLOCK,
    "Decoder": BLOCK,
    "TransformerBlock": BLOCK,
    "FFNBlock": FFN_DROPOUT,
    "SelfAttentionBlock": HEADS_KV | ATT_DROPOUT,
    "CrossAttentionBlock": HEADS_KV | ATT_DROPOUT,
}
REQUIRED_BESIDES = {"Embedding": ["embedding_size"]}  # cut off in the document

HEAD_MASK = {"head_mask": "documented as unused in models"}
OUTPUTS = {"output_attentions": "documented as unused in models"}
CACHE = {"cache": "decoding"}
CROSS_HEAD_MASK = {"cross_head_mask": "as head_mask"}
# Encoder and decoder have one forward; an encoder refuses these.
CROSS = dict.fromkeys(["cross_hidden_states", "cross_attention_mask", "cross_position_bias"], "a decoder's")
STACK_OUTPUTS = OUTPUTS | {"output_hidden_states": "documented as unused in models"}
ADDED_TO_FORWARD: dict[str, dict[str, str]] = {
    "RelativePositionEmbedding": {"query_offset": "decoding"},
    "RotaryEmbedding": {"query_offset": "decoding"},
    "Attention": HEAD_MASK | CACHE | OUTPUTS,
    "SelfAttentionBlock": HEAD_MASK | CACHE | OUTPUTS,
    "CrossAttentionBlock": HEAD_MASK | CACHE | OUTPUTS,
    "FFNBlock": {"add_to": "parallel blocks add to another stream"},
    "TransformerBlock": {"self_head_mask": "as head_mask"} | CROSS_HEAD_MASK | CACHE | STACK_OUTPUTS,
    "Encoder": CROSS | HEAD_MASK | CROSS_HEAD_MASK | CACHE | STACK_OUTPUTS,
    "Decoder": HEAD_MASK | CROSS_HEAD_MASK | CACHE | STACK_OUTPUTS,
}


def default(written: object) -> object:
    """What the table's value stands for in Python."""
    return {"torch.float16": HALF, "-inf": -math.inf}.get(written, written) if isinstance(written, str) else written


@pytest.mark.parametrize("name", DOCUMENTED)
def test_constructor_has_the_documented_names_and_defaults(name: str) -> None:
    documented = DOCUMENTED[name]
    parameters = inspect.signature(getattr(model_center.layer, name)).parameters
    required = [*documented["required"], *REQUIRED_BESIDES.get(name, [])]
    assert [key for key, value in parameters.items() if value.default is value.empty] == required
    assert list(parameters)[: len(required)] == required
    options = {key: value.default for key, value in parameters.items() if key not in required}
    expected = {key: default(value) for key, value in documented["options"].items()}
    assert {key: value for key, value in options.items() if key in expected} == expected
    added = options.keys() - expected.keys()
    assert added == ADDED[name].keys()
    assert all(parameters[key].kind is inspect.Parameter.KEYWORD_ONLY for key in added)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_forward_begins_with_the_documented_arguments(name: str) -> None:
    documented = DOCUMENTED[name]["forward"]
    forward = getattr(model_center.layer, name).forward
    parameters = [value for key, value in inspect.signature(forward).parameters.items() if key != "self"]
    names = [parameter.name for parameter in parameters]
    expected = [*documented["required"], *documented["options"]]
    assert names == [*expected, *ADDED_TO_FORWARD.get(name, {})]
    for parameter in parameters:
        # The engine's blocks take arguments by position only.
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if parameter.name in documented["options"]:
            assert parameter.default is None
        elif parameter.name in documented["required"] and (name, parameter.name) != ("Decoder", "position_bias"):
            assert parameter.default is parameter.empty


def test_embedding_has_its_projection() -> None:
    assert list(inspect.signature(model_center.layer.Embedding.projection).parameters) == ["self", "x"]


def test_every_public_name_exists_and_classes_are_described() -> None:
    for name in model_center.layer.__all__:
        public = getattr(model_center.layer, name)
        if inspect.isclass(public):
            assert public.__doc__
            assert public.__module__.startswith("model_center.layer")
