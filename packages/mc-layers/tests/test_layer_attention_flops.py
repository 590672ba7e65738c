"""What PyTorch counts for our attention, beside what it counts for its own on the same shapes; nothing is computed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
BATCH, LEN_Q, LEN_K, HEADS, DIM = 2, 7, 9, 6, 16
TOKENS, SEQUENCES, LONGEST = 20, 4, 8


def counted(attend: Any, *shapes: tuple[int, ...]) -> list[int]:
    """The operations of forward, and of backward."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        output = attend(*(torch.empty(shape, dtype=torch.float16, requires_grad=True) for shape in shapes))
        forward = counter.get_total_flops()
        output.sum().backward()
    return [forward, counter.get_total_flops() - forward]


def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first)[0]
    return output


@pytest.mark.parametrize("heads_kv", [HEADS, HEADS // 3])
@pytest.mark.parametrize("is_biased", [False, True])
def test_as_pytorch_counts_its_own(heads_kv: int, is_biased: bool) -> None:
    from model_center.layer.kernels.fused_attention import fused_attention

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bias = torch.zeros(HEADS, LEN_Q + LEN_K - 1, requires_grad=True) if is_biased else None
        return fused_attention(query, key, value, bias=bias, is_causal=is_biased)

    query, keys, whole = (BATCH, LEN_Q, HEADS, DIM), (BATCH, LEN_K, heads_kv, DIM), (BATCH, LEN_K, HEADS, DIM)
    assert counted(ours, query, keys, keys) == counted(theirs, query, whole, whole)


def test_packed_sequences_count_as_if_each_were_the_longest() -> None:
    from model_center.layer.kernels.fused_attention import fused_attention

    def ours(*tensors: Tensor) -> Tensor:
        cumulative = torch.zeros(SEQUENCES + 1, dtype=torch.int32)
        return fused_attention(*tensors, cumulative=cumulative, longest=LONGEST)

    packed, padded = (1, TOKENS, HEADS, DIM), (1, LONGEST, HEADS, DIM)
    of_padded = counted(theirs, padded, padded, padded)
    assert [part * LONGEST for part in counted(ours, packed, packed, packed)] == [part * TOKENS for part in of_padded]
