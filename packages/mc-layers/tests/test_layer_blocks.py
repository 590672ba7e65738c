"""Blocks and stacks against their naive references, and what else they can be asked for."""

from typing import Any

import pytest
import torch
from gradients import assert_gradients, randomize
from naive_layers import attention_layer, block, norm
from torch.testing import assert_close

from model_center.layer import (
    AttentionMask,
    CrossAttentionBlock,
    Decoder,
    Encoder,
    FFNBlock,
    SelfAttentionBlock,
    TransformerBlock,
)

F64 = torch.float64
SIZES: dict[str, Any] = {"dim_model": 6, "dim_ff": 8, "num_heads": 2, "dim_head": 4}
CAUSAL = AttentionMask(causal=True)
ALLOWED = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]


def states(length: int = 3) -> torch.Tensor:
    return torch.randn(2, length, 6, dtype=F64, generator=torch.Generator().manual_seed(length))


def renamed(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


BLOCKS: dict[str, dict[str, Any]] = {
    "pre": {},
    "biases": {"norm_bias": True, "att_bias": True, "ffn_bias": True},
    "post": {"post_layer_norm": True, "norm_bias": True},
    "parallel": {"parallel_ffn": True},
    "plain activation": {"ffn_activate_fn": "relu"},
    "decoder": {"is_decoder": True},
    "post decoder": {"is_decoder": True, "post_layer_norm": True},
    "parallel decoder": {"is_decoder": True, "parallel_ffn": True},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_transformer_block(name: str) -> None:
    options = BLOCKS[name]
    layer = TransformerBlock(**SIZES, **options, dtype=F64, attn_scale=True)
    weights = randomize(layer)
    cross = states(4) if layer.is_decoder else None
    expected = block(
        states(), weights, 4, layer.ffn_activate_fn, ALLOWED, cross, layer.post_layer_norm, layer.parallel_ffn
    )
    assert_close(layer(states(), CAUSAL, None, cross), expected)
    assert_close(layer(states(), torch.ones(2, 3, 3).tril().bool(), None, cross), expected)  # the documented mask
    assert_gradients(layer, states(), CAUSAL, None, cross, fast=True)


@pytest.mark.parametrize("post_layer_norm", [False, True])
def test_sub_layers(post_layer_norm: bool) -> None:
    shared: dict[str, Any] = {"dtype": F64, "post_layer_norm": post_layer_norm}
    x, other = states(), states(5)
    cases: list[tuple[torch.nn.Module, tuple[torch.Tensor | None, ...]]] = [
        (SelfAttentionBlock(6, 2, 4, **shared, attn_scale=True), (x, None)),
        (CrossAttentionBlock(6, 2, 4, **shared, attn_scale=True), (x, other, None)),
        (FFNBlock(6, 8, **shared), (x,)),
    ]
    for layer, inputs in cases:
        weights = randomize(layer)
        if isinstance(layer, FFNBlock):
            normed = norm(x, weights, "layernorm_before_ffn")
            added = layer.ffn(normed)
        else:
            normed = norm(x, weights, "layernorm_before_attention")
            key_value = normed if isinstance(layer, SelfAttentionBlock) else other
            added = attention_layer(normed, key_value, weights, "self_attention", 4, None)
        assert_close(layer(*inputs), (normed if post_layer_norm else x) + added)
        assert_gradients(layer, *inputs, fast=True)


def test_stacks_are_their_blocks_and_a_normalisation() -> None:
    encoder = Encoder(2, **SIZES, dtype=F64, attn_scale=True, norm_bias=True)
    weights = randomize(encoder)
    x = states()
    for i in range(2):
        x = block(x, renamed(weights, f"layers.{i}."), 4, "gated_gelu", ALLOWED)
    assert_close(encoder(states(), CAUSAL), norm(x, weights, "output_layernorm"))
    decoder = Decoder(2, **SIZES, dtype=F64, attn_scale=True, post_layer_norm=True)
    weights = randomize(decoder)
    x = states()
    for i in range(2):
        x = block(x, renamed(weights, f"layers.{i}."), 4, "gated_gelu", ALLOWED, states(4), post_layer_norm=True)
    expected = norm(x, weights, "output_layernorm")
    assert_close(decoder(states(), CAUSAL, None, states(4)), expected)
    assert_gradients(decoder, states(), CAUSAL, None, states(4), fast=True)


def test_names_are_those_of_existing_checkpoints() -> None:
    decoder = Decoder(1, **SIZES, att_bias=True)
    attention = ["project_q.weight", "project_q.bias", "project_k.weight", "project_k.bias", "project_v.weight"]
    attention += ["project_v.bias", "attention_out.weight", "attention_out.bias"]
    assert list(decoder.state_dict()) == [
        "layers.0.self_att.layernorm_before_attention.weight",
        *(f"layers.0.self_att.self_attention.{name}" for name in attention),
        "layers.0.cross_att.layernorm_before_attention.weight",
        *(f"layers.0.cross_att.self_attention.{name}" for name in attention),
        "layers.0.ffn.layernorm_before_ffn.weight",
        "layers.0.ffn.ffn.w_in.w_0.weight",
        "layers.0.ffn.ffn.w_in.w_1.weight",
        "layers.0.ffn.ffn.w_out.weight",
        "output_layernorm.weight",
    ]
    plain = Encoder(1, **SIZES, ffn_activate_fn="gelu", ffn_bias=True).state_dict()
    assert {"layers.0.ffn.ffn.w_in.w.weight", "layers.0.ffn.ffn.w_in.w.bias", "layers.0.ffn.ffn.w_out.bias"} <= set(
        plain
    )


@pytest.mark.parametrize("post_layer_norm", [False, True])
def test_hidden_states_and_attentions(post_layer_norm: bool) -> None:
    decoder = Decoder(3, **SIZES, dtype=F64, attn_scale=True, post_layer_norm=post_layer_norm)
    randomize(decoder)
    plain = decoder(states(), CAUSAL, None, states(4))
    output = decoder(states(), CAUSAL, None, states(4), output_attentions=True, output_hidden_states=True)
    assert_close(output.last_hidden_state, plain)
    assert len(output.hidden_states) == 4
    assert_close(output.hidden_states[-1], plain)
    x = states()
    for i, layer in enumerate(decoder.layers):
        assert isinstance(layer, TransformerBlock)
        begun = layer.self_att.layernorm_before_attention(x) if post_layer_norm else x
        assert_close(output.hidden_states[i], begun)
        x = layer(x, CAUSAL, None, states(4))
    for probabilities, length in ((output.attentions, 3), (output.cross_attentions, 4)):
        assert len(probabilities) == 3
        assert all(tensor.shape == (2, 2, 3, length) for tensor in probabilities)
        assert_close(probabilities[0].sum(-1), torch.ones(2, 2, 3, dtype=F64))
    assert not output.attentions[0].triu(1).any()
    only = decoder(states(), CAUSAL, output_attentions=True)
    assert only.hidden_states is None
    assert only.cross_attentions is None


def test_head_masks_are_taken_per_layer() -> None:
    decoder = Decoder(2, **SIZES, dtype=F64)
    randomize(decoder)
    ones = torch.ones(2, 2, dtype=F64)
    arguments = (states(), CAUSAL, None, states(4), None, None)
    plain = decoder(*arguments)
    assert_close(decoder(*arguments, ones, ones), plain)
    for self_mask, cross_mask in ((ones.clone(), ones), (ones, ones.clone())):
        for layer, head in ((0, 1), (1, 0)):
            mask = self_mask if cross_mask is ones else cross_mask
            mask.fill_(1)[layer, head] = 0
            output = decoder(*arguments, self_mask, cross_mask, None, True)
            of_layer = (output.attentions if cross_mask is ones else output.cross_attentions)[layer]
            assert not of_layer[:, head].any()
            assert of_layer[:, 1 - head].any()
            assert not torch.allclose(output.last_hidden_state, plain)


def test_a_decoder_without_a_second_sequence_attends_itself_only() -> None:
    decoder, encoder = Decoder(1, **SIZES, dtype=F64), Encoder(1, **SIZES, dtype=F64)
    encoder.load_state_dict({k: v for k, v in decoder.state_dict().items() if "cross_att" not in k})
    assert_close(decoder(states(), CAUSAL), encoder(states(), CAUSAL))


DROPOUTS: dict[str, dict[str, Any]] = {
    "everywhere": {"dropout_p": 0.5},
    "attention probabilities": {"att_dropout_p": 0.5},
    "feed-forward middle": {"ffn_dropout_p": 0.5},
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout(name: str) -> None:
    layer = TransformerBlock(**SIZES, dtype=F64, **DROPOUTS[name])
    randomize(layer)
    torch.manual_seed(0)
    trained = [layer.train()(states(), CAUSAL) for _ in range(2)]
    assert not torch.allclose(*trained)
    plain = TransformerBlock(**SIZES, dtype=F64)
    plain.load_state_dict(layer.state_dict())
    assert_close(layer.eval()(states(), CAUSAL), plain(states(), CAUSAL))
    where = {
        "attention probabilities": layer.self_att.self_attention.dropout_p,
        "feed-forward middle": layer.ffn.ffn.dropout_p,
        "output of attention": layer.self_att.dropout_p,
        "output of feed-forward": layer.ffn.dropout_p,
    }
    assert {key for key, value in where.items() if value} == ({*where} if name == "everywhere" else {name})


def test_residual_dropout_keeps_the_stream_and_drops_outputs() -> None:
    layer = FFNBlock(6, 8, dtype=F64, dropout_p=0.5, ffn_dropout_p=0.0)
    randomize(layer)
    x = states(200)
    added = layer.train()(x) - x
    expected = layer.eval()(x) - x
    dropped = added == 0
    assert 0.4 < dropped.double().mean() < 0.6
    assert_close(added[~dropped], 2 * expected[~dropped])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 12, "num_heads_kv": 8}, r"`num_heads` must be a multiple of `num_heads_kv` \(8\), but is 12"),
        ({"num_heads": 0}, r"`num_heads` must be a positive integer, but is 0"),
        ({"dim_model": -3}, r"`dim_model` must be a positive integer, but is -3"),
        ({"pos_bias_type": "rotating"}, r"`pos_bias_type` must be one of 'none', 'relative', 'rotary', but is 'rotat"),
        (
            {"ffn_activate_fn": "gated_gleu"},
            r"`activate_fn` must be one of 'relu', .*'gated_silu', but is 'gated_gleu'",
        ),
        ({"dropout_p": 1.5}, r"`dropout_p` must be at least 0 and less than 1, but is 1.5"),
        ({"parallel_ffn": True, "post_layer_norm": True}, r"`parallel_ffn` must be False with `post_layer_norm`"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerBlock(**{**SIZES, **options})


def test_inputs_that_do_not_fit() -> None:
    encoder = Encoder(2, **SIZES, dtype=F64)
    x = states()
    wide = torch.zeros(2, 3, 7, dtype=F64)
    bias = torch.zeros(2, 3, 3, dtype=F64)
    relative = Encoder(2, **SIZES, dtype=F64, pos_bias_type="relative")
    rotary = Encoder(2, **SIZES, dtype=F64, pos_bias_type="rotary")
    for call, message in (
        (lambda: encoder(wide, None), r"last dimension of `hidden_states` must be `dim_model` \(6\), .* \(2, 3, 7\)"),
        (lambda: encoder(x[0], None), r"`hidden_states` must have shape \(batch, length, dim_model\), .* \(3, 6\)"),
        (lambda: encoder(x, None, bias), r"`position_bias` must be None with pos_bias_type='none', but is Tensor"),
        (lambda: rotary(x, None), r"`position_bias` must be a RotaryEmbedding or .* but is NoneType"),
        (lambda: relative(x, None, bias[:, :2]), r"`position_bias` must have shape .* = \(2, 3, 3\), .* \(2, 2, 3\)"),
        (lambda: relative(x, None, bias.tolist()), r"`position_bias` must be a tensor or None .* but is list"),
        (lambda: relative(x, None, bias.expand(4, 2, 3, 3)), r"`position_bias` must have .* has \(4, 2, 3, 3\)"),
        (lambda: encoder(x, None, head_mask=torch.ones(2)), r"`head_mask` .* \(num_layers, num_heads\) = \(2, 2\)"),
        (lambda: encoder.layers[0](x, None, None, x), r"`cross_hidden_states` must be None .*is_decoder=False"),
        (lambda: encoder(x, None, None, x), r"`cross_hidden_states` must be None in an encoder"),
        (
            lambda: encoder(x, None, None, None, AttentionMask(key_padding=torch.zeros(2, 4).bool())),
            r"`cross_attention_mask`, .* must be None without `cross_hidden",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()  # type: ignore[no-untyped-call]
