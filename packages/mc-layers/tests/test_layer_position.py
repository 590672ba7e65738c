"""Relative position biases and rotations."""

import cmath
import math
from collections.abc import Callable

import pytest
import torch
from gradients import assert_gradients, randomize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from model_center.layer import RelativePositionEmbedding, RotaryEmbedding

F64 = torch.float64


def bucket(distance: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """T5's bucket of key position minus query position, in plain arithmetic."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    growth = math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(exact + int(growth * (num_buckets - exact) + 1e-6), num_buckets - 1)


@given(
    st.integers(-300, 300),
    st.booleans(),
    st.sampled_from([(32, 128), (32, 1024), (8, 20), (4, 7)]),
)
@settings(deadline=None)
def test_buckets(distance: int, bidirectional: bool, sizes: tuple[int, int]) -> None:
    layer = RelativePositionEmbedding(1, *sizes, bidirectional)
    assert layer.buckets(torch.tensor(distance)).item() == bucket(distance, bidirectional, *sizes)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_relative_position_embedding(bidirectional: bool, offset: int) -> None:
    layer = RelativePositionEmbedding(3, 8, 10, bidirectional, dtype=F64)
    weight = randomize(layer)["relative_attention_bias"]
    bias = layer(5, 12, offset)
    assert bias.shape == (3, 5, 12)
    for query in range(5):
        for key in range(12):
            row = weight[bucket(key - query - offset, bidirectional, 8, 10)]
            assert_close(bias[:, query, key], row)
    assert_gradients(layer, 5, 12, offset)


def test_the_last_bucket_learns() -> None:
    layer = RelativePositionEmbedding(2, 8, 16, dtype=F64)
    layer(40, 40).sum().backward()
    assert layer.relative_attention_bias.grad is not None
    assert layer.relative_attention_bias.grad[-1].abs().min() > 0


def rotated(vector: list[float], position: int, rotary_dim: int) -> list[float]:
    """Each pair of neighbours as a complex number, turned."""
    turned = list(vector)
    for i in range(0, rotary_dim, 2):
        number = complex(vector[i], vector[i + 1]) * cmath.rect(1, position * 10000 ** (-i / rotary_dim))
        turned[i : i + 2] = [number.real, number.imag]
    return turned


@pytest.mark.parametrize(("rotary_dim", "offset"), [(4, 0), (6, 0), (4, 5)])
def test_rotary_embedding(rotary_dim: int, offset: int) -> None:
    h_q, h_k = torch.randn(3, 4, 6, dtype=F64), torch.randn(3, 7, 6, dtype=F64)
    outputs = RotaryEmbedding(rotary_dim)(h_q, h_k, offset)
    for before, after in zip((h_q, h_k), outputs, strict=True):
        expected = [
            [rotated(vector, position + offset, rotary_dim) for position, vector in enumerate(head)]
            for head in before.tolist()
        ]
        assert_close(after, torch.tensor(expected, dtype=F64))


def test_rotary_position_ids_may_differ_between_sequences() -> None:
    x = torch.randn(2, 3, 4, 6, dtype=F64)
    ids = torch.tensor([[0, 0, 1, 2], [4, 5, 6, 7]])
    turned = RotaryEmbedding(6).positions(ids, F64).rotate(x)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(3) for i in range(4)):
        assert_close(turned[b, h, i].tolist(), rotated(x[b, h, i].tolist(), int(ids[b, i]), 6))


def test_rotations_are_computed_in_float32_for_half_precision() -> None:
    x = torch.randn(1, 1, 1, 8)
    position = RotaryEmbedding(8).positions(torch.tensor([2001]), torch.bfloat16)
    assert position.cos.dtype == torch.float32
    turned = position.rotate(x.bfloat16())
    assert turned.dtype == torch.bfloat16
    expected = torch.tensor(rotated(x.flatten().tolist(), 2001, 8))
    assert_close(turned.flatten().float(), expected, rtol=2e-2, atol=2e-2)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
@settings(deadline=None)
def test_rotated_products_depend_on_distance_only(a: int, b: int, shift: int) -> None:
    rotary = RotaryEmbedding(4)
    query, key = torch.randn(1, 6, dtype=F64), torch.randn(1, 6, dtype=F64)

    def product(query_position: int, key_position: int) -> torch.Tensor:
        turned_q = rotary.positions(torch.tensor([query_position]), F64).rotate(query)
        return (turned_q * rotary.positions(torch.tensor([key_position]), F64).rotate(key)).sum()

    assert_close(product(a, b), product(a + shift, b + shift))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RotaryEmbedding(5), r"`rotary_dim` must be even, but is 5"),
        (
            lambda: RotaryEmbedding(8)(*torch.zeros(2, 1, 3, 6)),
            r"`rotary_dim` must be at most `dim_head` \(6\), but is 8",
        ),
        (lambda: RelativePositionEmbedding(0), r"`num_heads` must be a positive integer, but is 0"),
        (lambda: RelativePositionEmbedding(2, 32, 16), r"`max_distance` must be greater than .* `max_distance` 16"),
        (lambda: RelativePositionEmbedding(2, 3, bidirectional=True), r"at least one, but `num_buckets` is 3"),
        (lambda: RelativePositionEmbedding(2)(3, 0), r"`key_len` must be a positive integer, but is 0"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
