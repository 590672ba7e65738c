"""Attention: every kernel against one query vector after another."""

import math

import pytest
import torch
from gradients import assert_gradients, randomize
from naive_layers import attention, attention_layer
from torch import Tensor
from torch.testing import assert_close

from model_center.layer import Attention, AttentionMask, RelativePositionEmbedding, RotaryEmbedding
from model_center.layer.attention_kernels import Scoring, attend, attend_reference

F64 = torch.float64
BATCH, HEADS, LENGTH, DIM = 3, 4, 6, 8

LENGTHS = torch.tensor([LENGTH, 2, 0])
LEFT_PADDING = torch.arange(LENGTH) < torch.tensor([[0], [3], [LENGTH]])
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5]])
CONTEXT = torch.arange(LENGTH) < torch.tensor([[2], [0], [LENGTH]])
MASKS: dict[str, AttentionMask | None] = {
    "none": None,
    "causal": AttentionMask(causal=True),
    "lengths": AttentionMask(lengths=LENGTHS),
    "causal lengths": AttentionMask(causal=True, lengths=LENGTHS),
    "padding": AttentionMask(key_padding=LEFT_PADDING),
    "causal padding": AttentionMask(causal=True, key_padding=LEFT_PADDING),
    "documents": AttentionMask(documents=DOCUMENTS),
    "causal documents": AttentionMask(causal=True, documents=DOCUMENTS),
    "context": AttentionMask(context=CONTEXT, lengths=LENGTHS, documents=DOCUMENTS),
    "dense": AttentionMask.from_dense(
        torch.rand(BATCH, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.3
    ),
    "dense for all": AttentionMask.from_dense(torch.eye(LENGTH, dtype=torch.long)[None]),
    "nothing": AttentionMask.from_dense(torch.zeros(1, LENGTH, LENGTH, dtype=torch.bool)),
}


def tensors(heads_kv: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=F64, generator=generator)
    key, value = torch.randn(2, BATCH, heads_kv, LENGTH, DIM, dtype=F64, generator=generator)
    return query, key, value


def meaningful(name: str) -> Tensor:
    """Which queries are compared: padding's own outputs have no meaning where causality hides it from the others."""
    if name == "causal lengths":
        return (torch.arange(LENGTH) < LENGTHS[:, None])[:, None, :, None]
    return torch.ones(1, 1, 1, 1, dtype=torch.bool)


@pytest.mark.parametrize(
    "bias_shape", [None, (HEADS, LENGTH, LENGTH), (1, HEADS, LENGTH, LENGTH), (BATCH, HEADS, LENGTH, LENGTH)]
)
@pytest.mark.parametrize("heads_kv", [HEADS, 2, 1])
@pytest.mark.parametrize("name", MASKS)
def test_kernels(name: str, heads_kv: int, bias_shape: tuple[int, ...] | None) -> None:
    mask = MASKS[name]
    query, key, value = tensors(heads_kv)
    bias = None if bias_shape is None else torch.randn(bias_shape, dtype=F64)
    allowed = None if mask is None else mask.materialize(LENGTH, LENGTH)
    resolved = (mask or AttentionMask()).resolve(LENGTH, LENGTH, query.device)
    scoring = Scoring(bias=bias, scale=0.3)
    expected = attention(query, key, value, allowed, bias, scale=0.3)
    fused, nothing = attend(query, key, value, resolved, scoring)
    reference, probabilities = attend_reference(query, key, value, resolved, scoring)
    assert nothing is None
    compared = meaningful(name)
    for output in (fused, reference):
        assert output.isfinite().all()
        assert_close(output.where(compared, 0), expected.where(compared, 0))
    assert_close(probabilities @ value.repeat_interleave(HEADS // heads_kv, 1), reference)


@pytest.mark.parametrize("learns_bias", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_gradients_are_finite_and_right_whatever_is_masked(name: str, learns_bias: bool) -> None:
    mask = (MASKS[name] or AttentionMask()).resolve(LENGTH, LENGTH, torch.device("cpu"))
    inputs = tuple(tensor.requires_grad_() for tensor in tensors(2))
    bias = torch.randn(HEADS, LENGTH, LENGTH, dtype=F64, requires_grad=learns_bias)

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attend(query, key, value, mask, Scoring(bias=bias))[0]

    assert torch.autograd.gradcheck(call, (*inputs, bias), fast_mode=True)


@pytest.mark.parametrize("mask_value", [-2.0, -100.0, -10000.0, -math.inf])
def test_mask_value_takes_the_masked_scores_place(mask_value: float) -> None:
    query, key, value = tensors()
    dense = torch.rand(BATCH, LENGTH, LENGTH) < 0.6
    dense[0, 0] = False  # attends nothing
    mask = AttentionMask.from_dense(dense).resolve(LENGTH, LENGTH, query.device)
    expected = attention(query, key, value, dense[:, None], scale=0.5, mask_value=mask_value)
    assert_close(attend(query, key, value, mask, Scoring(scale=0.5, mask_value=mask_value))[0], expected)
    assert not expected[0, :, 0].any()


def test_dropout_drops_probabilities() -> None:
    query, key, _ = tensors()
    value = torch.ones(BATCH, HEADS, LENGTH, DIM, dtype=F64)
    mask = AttentionMask().resolve(LENGTH, LENGTH, query.device)
    torch.manual_seed(0)
    for need in (False, True):
        output, probabilities = attend(query, key, value, mask, Scoring(dropout_p=0.5), need)
        assert 0.8 < output.mean() < 1.2  # unbiased
        assert output.std() > 0.1
        if probabilities is not None:
            assert_close(probabilities @ value, output)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_heads_kv", [None, 1])
@pytest.mark.parametrize("pos_bias_type", ["none", "relative", "rotary"])
def test_attention_layer(pos_bias_type: str, num_heads_kv: int | None, bias: bool) -> None:
    layer = Attention(
        6, 4, 2, 5, dtype=F64, attn_scale=True, bias=bias, pos_bias_type=pos_bias_type, num_heads_kv=num_heads_kv
    )
    weights = {f"a.{name}": value for name, value in randomize(layer).items()}
    x = torch.randn(2, 3, 6, dtype=F64)
    dense = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).expand(2, 3, 3)
    position_bias = {"none": None, "relative": torch.randn(2, 3, 3, dtype=F64), "rotary": RotaryEmbedding(4)}
    if pos_bias_type == "none":
        expected = attention_layer(x, x, weights, "a", 4, dense[:, None].bool())
        assert_close(layer(x, x, dense), expected)
    assert_gradients(layer, x, x, dense, position_bias[pos_bias_type], fast=True)


def test_relative_bias_is_added_and_rotation_applied() -> None:
    x = torch.randn(2, 5, 6, dtype=F64)
    plain = Attention(6, 4, 2, dtype=F64)
    for pos_bias_type in ("relative", "rotary"):
        layer = Attention(6, 4, 2, dtype=F64, pos_bias_type=pos_bias_type)
        layer.load_state_dict(plain.state_dict())
        q, k, v = (
            torch.stack(project(x).split(4, dim=-1), 1)
            for project in (plain.project_q, plain.project_k, plain.project_v)
        )
        if pos_bias_type == "relative":
            bias = RelativePositionEmbedding(2, dtype=F64)(5, 5)
            expected, position_bias = attention(q, k, v, bias=bias[None]), bias
        else:
            rotary = RotaryEmbedding(4)
            q, k = rotary(q, k)
            expected, position_bias = attention(q, k, v), rotary
        expected = plain.attention_out(torch.cat(expected.unbind(1), -1))
        assert_close(layer(x, x, None, position_bias), expected)
        assert not torch.allclose(plain(x, x, None), expected)


def test_queries_and_keys_may_differ_in_length() -> None:
    layer = Attention(6, 4, 2, dtype=F64, attn_scale=True)
    weights = {f"a.{name}": value for name, value in randomize(layer).items()}
    x, other = torch.randn(2, 3, 6, dtype=F64), torch.randn(2, 5, 6, dtype=F64)
    padding = torch.tensor([[False] * 5, [False] * 2 + [True] * 3])
    expected = attention_layer(x, other, weights, "a", 4, ~padding[:, None, None])
    assert_close(layer(x, other, AttentionMask(key_padding=padding)), expected)


def test_head_mask_and_output_attentions() -> None:
    layer = Attention(6, 4, 2, dtype=F64, attn_scale=True)
    x = torch.randn(2, 3, 6, dtype=F64)
    mask = AttentionMask(causal=True)
    head_mask = torch.tensor([1.0, 0.0], dtype=F64)
    output, probabilities = layer(x, x, mask, None, head_mask, None, True)
    assert probabilities.shape == (2, 2, 3, 3)
    assert not probabilities[:, 1].any()
    assert_close(probabilities[:, 0].sum(-1), torch.ones(2, 3, dtype=F64))
    values = torch.stack(layer.project_v(x).split(4, dim=-1), 1)
    assert_close(output, layer.attention_out(torch.cat((probabilities @ values).unbind(1), -1)))
    assert_close(layer(x, x, mask, None, head_mask), output)  # the fused kernel
    assert_close(layer(x, x, mask, None, None, None, True)[0], layer(x, x, mask))


def test_length_scale_reaches_all_projections() -> None:
    layer = Attention(9, 4, 4, dtype=F64, length_scale=True)
    plain = Attention(9, 4, 4, dtype=F64)
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.div_(4 if name.startswith("attention_out") else 3)
    x = torch.randn(1, 3, 9, dtype=F64)
    assert_close(layer(x, x, None), plain(x, x, None))
