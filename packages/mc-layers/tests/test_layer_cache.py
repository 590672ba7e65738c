"""Decoding with a cache equals one pass over everything."""

from typing import Any

import pytest
import torch
from gradients import randomize
from torch import Tensor
from torch.testing import assert_close

from model_center.engine import TorchEngine, use_engine
from model_center.layer import (
    Attention,
    AttentionMask,
    Decoder,
    Encoder,
    KeyValueCache,
    RelativePositionEmbedding,
    RotaryEmbedding,
)

F64 = torch.float64
SIZES: dict[str, Any] = {"num_layers": 2, "dim_model": 8, "dim_ff": 12, "num_heads": 4, "dim_head": 4}
LENGTH = 7
RIGHT = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [5], [3]])
LEFT = RIGHT.flip(1)
CHUNKS = {"one by one": [1] * LENGTH, "prompt first": [4, 1, 1, 1], "in pieces": [2, 3, 2], "at once": [LENGTH]}


def states(length: int = LENGTH) -> Tensor:
    return torch.randn(3, length, 8, dtype=F64, generator=torch.Generator().manual_seed(length))


def position_bias(pos_bias_type: str, padding: Tensor, start: int, end: int) -> Any:
    """Position bias of positions `start` to `end`; rotations count real tokens only, as models do with padding."""
    if pos_bias_type == "relative":
        torch.manual_seed(0)
        return RelativePositionEmbedding(4, 8, 10, dtype=F64)(end - start, end, start).detach()
    if pos_bias_type == "rotary":
        positions = ((~padding).long().cumsum(1) - 1).clamp(min=0)
        return RotaryEmbedding(4).positions(positions[:, start:end], F64)
    return None


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("padding", [torch.zeros_like(LEFT), RIGHT, LEFT], ids=["none", "right", "left"])
@pytest.mark.parametrize(("pos_bias_type", "num_heads_kv"), [("none", None), ("relative", 2), ("rotary", 1)])
@torch.no_grad()
def test_cached_decoding(pos_bias_type: str, num_heads_kv: int | None, padding: Tensor, chunks: str) -> None:
    model = Encoder(**SIZES, dtype=F64, pos_bias_type=pos_bias_type, num_heads_kv=num_heads_kv, attn_scale=True)
    randomize(model)
    full = model(
        states(), AttentionMask(causal=True, key_padding=padding), position_bias(pos_bias_type, padding, 0, LENGTH)
    )
    cache = KeyValueCache(num_layers=2, max_length=LENGTH)
    outputs = []
    for length in CHUNKS[chunks]:
        start, end = cache.length, cache.length + length
        mask = AttentionMask(causal=True, key_padding=padding[:, :end])
        bias = position_bias(pos_bias_type, padding, start, end)
        outputs.append(model(states()[:, start:end], mask, bias, cache=cache))
    assert cache.length == LENGTH
    assert_close(torch.cat(outputs, 1)[~padding], full[~padding])
    nothing = torch.empty(3, num_heads_kv or 4, 0, 4, dtype=F64)
    keys, _ = cache.layers[0].self_attention.store(nothing, nothing)
    assert keys.shape == (3, num_heads_kv or 4, LENGTH, 4)  # unexpanded


@torch.no_grad()
def test_cached_decoding_with_cross_attention() -> None:
    model = Decoder(**SIZES, dtype=F64, attn_scale=True)
    randomize(model)
    causal, source, source_mask = AttentionMask(causal=True), states(5), AttentionMask(lengths=torch.tensor([5, 3, 1]))
    full = model(states(), causal, None, source, source_mask)
    cache = KeyValueCache(2, LENGTH)
    outputs = [model(states()[:, :1], causal, None, source, source_mask, cache=cache)]
    assert cache.cross_length == 5
    # The source is not looked at again.
    outputs += [
        model(states()[:, i : i + 1], causal, None, later, source_mask, cache=cache)
        for i, later in zip(range(1, LENGTH), [None, source * 1e3] * 3, strict=True)
    ]
    assert_close(torch.cat(outputs, 1), full)


@torch.no_grad()
def test_rotary_embedding_itself_counts_cached_positions() -> None:
    layer = Attention(8, 4, 2, dtype=F64, pos_bias_type="rotary")
    rotary, causal = RotaryEmbedding(4), AttentionMask(causal=True)
    cache = KeyValueCache(1, 2).layers[0].self_attention
    outputs = []
    for i in range(LENGTH):
        step = states()[:, i : i + 1]
        outputs.append(layer(step, step, causal, rotary, None, cache))
    assert_close(torch.cat(outputs, 1), layer(states(), states(), causal, rotary))


@torch.no_grad()
def test_room_is_made_once_and_doubles_when_full() -> None:
    cache = KeyValueCache(1, max_length=4).layers[0].self_attention
    stored = torch.arange(9.0).view(1, 1, 9, 1)
    seen = []
    for i in range(9):
        keys, values = cache.store(stored[:, :, i : i + 1], -stored[:, :, i : i + 1])
        assert_close(keys, stored[:, :, : i + 1])
        assert_close(values, -stored[:, :, : i + 1])
        seen.append(keys.untyped_storage().nbytes() // 4)
    assert seen == [4, 4, 4, 4, 8, 8, 8, 8, 16]


@torch.no_grad()
def test_reorder_and_truncate() -> None:
    model = Decoder(**SIZES, dtype=F64)
    randomize(model)
    causal, source, rows = AttentionMask(causal=True), states(5), torch.tensor([2, 0, 0, 1])
    cache = KeyValueCache(2, LENGTH)
    model(states(), causal, None, source, cache=cache)
    cache.truncate(3)
    cache.reorder(rows)
    output = model(states()[rows, 3:5], causal, None, None, cache=cache)
    assert_close(output, model(states()[rows], causal, None, source[rows])[:, 3:5])
    for length in (-1, 6):
        with pytest.raises(
            ValueError, match=rf"`length` must lie between 0 and the cached length \(5\), but is {length}"
        ):
            cache.truncate(length)


def test_gradients_reach_the_calls_own_positions() -> None:
    model = Encoder(**SIZES, dtype=F64)
    randomize(model)
    causal = AttentionMask(causal=True)
    x = states().requires_grad_()
    (expected,) = torch.autograd.grad(model(x, causal).sum(), x)
    (gradient,) = torch.autograd.grad(model(x, causal, cache=KeyValueCache(2, LENGTH)).sum(), x)
    assert_close(gradient, expected)
    cache = KeyValueCache(2, LENGTH)
    first = model(x[:, :3], causal, cache=cache)
    second = model(x[:, 3:], causal, cache=cache)
    assert_close(torch.cat([first, second], 1), model(x, causal))
    (gradient,) = torch.autograd.grad(second.sum(), x)
    assert not gradient[:, :3].any()
    assert gradient[:, 3:].any()


def test_errors() -> None:
    model = Encoder(**SIZES, dtype=F64)
    with pytest.raises(ValueError, match=r"`cache` must have one entry for each of the 2 layers, but has 3"):
        model(states(), None, cache=KeyValueCache(3, 4))
    with pytest.raises(ValueError, match=r"`max_length` must be a positive integer, but is 0"):
        KeyValueCache(2, 0)
    cache = KeyValueCache(2, 4)
    model(states(), None, cache=cache)
    with pytest.raises(ValueError, match=r"continues the batch it began with, .* = \(3, 4, 7, 4\) .* \(1, 4, 7, 4\)"):
        model(states()[:1], None, cache=cache)
    with pytest.raises(ValueError, match=r"`key_value` must be given unless a cache holds"):
        Attention(8, 4, 2, dtype=F64)(states(), None, None)
    with (
        use_engine(TorchEngine(torch.device("cpu"), use_checkpoint=True)),
        pytest.raises(ValueError, match=r"`cache` must be None while blocks recompute .* torch.no_grad\(\)"),
    ):
        model(states(), None, cache=KeyValueCache(2, 4))
