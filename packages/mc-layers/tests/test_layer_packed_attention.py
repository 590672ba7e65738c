"""Attention over packed sequences: each sequence by itself is the reference."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_layers import attention
from torch import Tensor
from torch.testing import assert_close

from model_center.layer.attention_kernels import Packing, Scoring, attend_packed

F64 = torch.float64


def packing_of(lengths: list[int], is_causal: bool = False) -> Packing:
    cumulative = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Packing(cumulative=cumulative, longest=max(lengths), is_causal=is_causal)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any),
    is_causal=st.booleans(),
    biased=st.booleans(),
    heads_kv=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_every_sequence_attends_itself(
    lengths: list[int], is_causal: bool, biased: bool, heads_kv: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    total, longest = sum(lengths), max(lengths)
    query = torch.randn(total, 2, 3, dtype=F64, generator=generator)
    key, value = torch.randn(2, total, heads_kv, 3, dtype=F64, generator=generator)
    bias = torch.randn(2, longest, longest, dtype=F64, generator=generator) if biased else None
    output = attend_packed(query, key, value, packing_of(lengths, is_causal), Scoring(bias=bias, scale=0.7))
    assert output.shape == query.shape
    parts = [x.split(lengths) for x in (query, key, value, output)]
    for length, *tensors in zip(lengths, *parts, strict=True):
        if length:
            q, k, v, mine = (x.transpose(0, 1)[None] for x in tensors)
            allowed = torch.ones(length, length, dtype=torch.bool).tril() if is_causal else None
            own_bias = None if bias is None else bias[:, :length, :length]
            assert_close(mine, attention(q, k, v, allowed, own_bias, scale=0.7))


def test_gradients_of_packed_attention() -> None:
    tensors = tuple(torch.randn(6, 2, 3, dtype=F64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 4, 4, dtype=F64, requires_grad=True)
    packing = packing_of([4, 0, 2])

    def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attend_packed(query, key, value, packing, Scoring(bias=bias))

    assert torch.autograd.gradcheck(call, (*tensors, bias), fast_mode=True)
