"""A bias given once for each distance does what the dense one does, whichever way attention goes."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from model_center.engine import TorchEngine, use_engine
from model_center.engine.tensors import has_triton
from model_center.layer import (
    Attention,
    AttentionMask,
    Decoder,
    Encoder,
    KeyValueCache,
    RelativePositionEmbedding,
    attention_kernels,
)
from model_center.layer.attention_kernels import Packing, Scoring, attend, attend_packed, attend_reference, shared_bias
from model_center.layer.attention_mask import ScoreMask
from model_center.layer.kernels import requirements

F64 = torch.float64


@pytest.mark.parametrize("query_offset", [0, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_query_and_key_find_their_distance(bidirectional: bool, query_offset: int) -> None:
    layer = RelativePositionEmbedding(3, 8, 10, bidirectional, dtype=F64)
    dense, by_distance = layer(5, 8, query_offset), layer.by_distance(5, 8, query_offset)
    assert by_distance.shape == (3, 12)
    for query in range(5):
        for key in range(8):
            assert_close(by_distance[:, key - query + 4], dense[:, query, key])


def test_gradients_of_layers_add_up_in_float32() -> None:
    layer = RelativePositionEmbedding(2, dtype=torch.bfloat16)
    by_distance = layer.by_distance(4, 4)
    assert by_distance.dtype == torch.float32
    assert layer(4, 4).dtype == torch.bfloat16
    (1000.0 * by_distance.sum() + sum(0.5 * by_distance.sum() for _ in range(16))).backward()
    assert layer.relative_attention_bias.grad is not None
    assert layer.relative_attention_bias.grad[1, 0] == 1008.0  # in bfloat16, 1000 + 0.5 is 1000


def test_attention_takes_both_forms() -> None:
    attention = Attention(6, 4, 2, dtype=F64, pos_bias_type="relative")
    positions = RelativePositionEmbedding(2, 8, 10, True, dtype=F64)
    x, memory = torch.randn(2, 5, 6, dtype=F64), torch.randn(2, 7, 6, dtype=F64)
    table = positions.relative_attention_bias
    for output_attentions in (False, True):
        results = []
        for bias in (positions(5, 7), positions.by_distance(5, 7)):
            output = attention(
                x, memory, AttentionMask(lengths=torch.tensor([7, 2])), bias, None, None, output_attentions
            )
            output = output[0] if output_attentions else output
            results.append((output, *torch.autograd.grad(output.sin().sum(), [table])))
        for dense, by_distance in zip(*results, strict=True):
            assert_close(by_distance, dense)
    with pytest.raises(ValueError, match=r"or \(num_heads, len_q \+ len_k - 1\) = \(2, 11\), but has \(2, 10\)"):
        attention(x, memory, None, torch.zeros(2, 10, dtype=F64))


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_stacks_take_both_forms(use_checkpoint: bool) -> None:
    with use_engine(TorchEngine(use_checkpoint=use_checkpoint)):
        stack = Decoder(3, 8, 16, 2, 4, pos_bias_type="relative", dtype=F64)
        positions = RelativePositionEmbedding(2, 8, 10, dtype=F64)
        x = torch.randn(2, 6, 8, dtype=F64)
        results = []
        for bias in (positions(6, 6), positions.by_distance(6, 6)):
            output = stack(x, AttentionMask(causal=True), bias)
            results.append((output, *torch.autograd.grad(output.sin().sum(), list(positions.parameters()))))
    for dense, by_distance in zip(*results, strict=True):
        assert_close(by_distance, dense)


def test_cached_decoding() -> None:
    stack = Encoder(2, 8, 16, 2, 4, pos_bias_type="relative", dtype=F64)
    positions = RelativePositionEmbedding(2, 8, 10, dtype=F64)
    x, mask = torch.randn(2, 6, 8, dtype=F64), AttentionMask(causal=True)
    with torch.no_grad():
        expected = stack(x, mask, positions.by_distance(6, 6))
        cache = KeyValueCache(2, 6)
        parts = [(0, 4), (4, 5), (5, 6)]
        outputs = [
            stack(x[:, start:end], mask, positions.by_distance(end - start, end, start), cache=cache)
            for start, end in parts
        ]
    assert_close(torch.cat(outputs, 1), expected)


def test_packed_sequences_take_both_forms() -> None:
    query, key, value = torch.randn(3, 6, 2, 3, dtype=F64)
    packing = Packing(cumulative=torch.tensor([0, 4, 6], dtype=torch.int32), longest=4)
    positions = RelativePositionEmbedding(2, 8, 10, dtype=F64)
    outputs = [
        attend_packed(query, key, value, packing, Scoring(bias=bias))
        for bias in (positions(4, 4), positions.by_distance(4, 4))
    ]
    assert_close(outputs[0], outputs[1])


def test_the_reason_for_the_slow_way_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    requirements._tell.cache_clear()
    query = torch.randn(1, 2, 20, 4)
    mask = AttentionMask().resolve(20, 20, query.device)
    with caplog.at_level(logging.INFO, "model_center"):
        for _ in range(2):
            attend(query, query, query, mask, Scoring(bias=torch.zeros(2, 39)))
    (record,) = caplog.records
    assert record.message.startswith("attention writes out position biases and masks of packed documents, because ")
    assert record.message.endswith("the device is cpu, not an NVIDIA GPU")


class OldGPU:
    type = "cuda"


@pytest.mark.parametrize(
    ("capability", "dtype", "dim_head", "reason"),
    [
        ((7, 5), torch.float16, 64, "compute capability is 7.5, less than 8.0"),
        ((9, 0), torch.float32, 64, "the data type is torch.float32, neither float16 nor bfloat16"),
        ((9, 0), torch.bfloat16, 256, "`dim_head` is 256, greater than 128"),
        ((9, 0), torch.bfloat16, 128, None),
        ((8, 0), torch.float16, 12, None),
    ],
)
def test_what_the_kernels_need(
    capability: tuple[int, int], dtype: torch.dtype, dim_head: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    device: Any = OldGPU()
    found = requirements._obstacle(device, dtype, dim_head)
    assert found is None if reason is None else found is not None and reason in found


def test_more_heads_than_cuda_launches_go_the_slow_way_and_it_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requirements._tell.cache_clear()
    monkeypatch.setattr(requirements, "_suit", lambda *_: True)  # as on a GPU
    x = torch.empty(0)
    with caplog.at_level(logging.INFO, "model_center"):
        assert requirements.fused_kernels_take(x, 64, 65_535)
        assert not caplog.records
        assert not requirements.fused_kernels_take(x, 64, 65_536)
        assert not requirements.fused_kernels_take(x, 64, 131_072)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.endswith("a batch has more than 65535 heads, those of all its sequences together")
    with requirements.meta_stands_for_gpu():
        half = torch.empty(1, dtype=torch.float16, device="meta")
        assert requirements.fused_kernels_take(half, 64, 65_535) == has_triton()
        assert not requirements.fused_kernels_take(half, 64, 65_536)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("most", [5, 6])
def test_heads_of_all_sequences_count(most: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements._tell.cache_clear()
    monkeypatch.setattr(requirements, "_suit", lambda *_: True)  # as on a GPU
    monkeypatch.setattr(requirements, "_MOST_HEADS", most)
    for name in ("_attend_fused", "_attend_packed_fused"):
        monkeypatch.setattr(attention_kernels, name, lambda query, *_: torch.zeros_like(query))
    mask = AttentionMask().resolve(20, 20, torch.device("cpu"))
    packing = Packing(cumulative=torch.tensor([0, 20, 40, 60], dtype=torch.int32), longest=20)

    def outputs(query: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        row, scoring = query.transpose(1, 2).flatten(0, 1), Scoring(bias=bias)
        batch, _ = attend(query, query, query, mask, scoring)
        packed = attend_packed(row, row, row, packing, scoring)
        return batch, packed.view(3, 20, 2, 4).transpose(1, 2), shared_bias(bias, query[:, 0], mask, 4)

    query, bias = torch.randn(3, 2, 20, 4), torch.randn(2, 39)
    torch._dynamo.maybe_mark_dynamic(query, 0)  # then the compiler compares a symbol
    call = torch.compile(outputs, backend="eager", fullgraph=True) if compiled else outputs
    batch, packed, shared = call(query, bias)
    assert shared.dim() == (2 if most == 6 else 3)
    expected = attend_reference(query, query, query, mask, Scoring(bias=bias))[0]
    for output in (batch, packed):
        assert_close(output, torch.zeros_like(output) if most == 6 else expected)


def test_a_compiled_stack_is_one_graph() -> None:
    stack = Encoder(2, 8, 16, 2, 4, pos_bias_type="relative", dtype=torch.float32)
    positions = RelativePositionEmbedding(2, 8, 10, True, dtype=torch.float32)

    def model(x: Tensor) -> Any:
        return stack(x, None, positions.by_distance(x.shape[1], x.shape[1]))

    x = torch.randn(2, 20, 8)
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_stacks_write_the_bias_out_once() -> None:
    by_distance = torch.randn(2, 39)
    dense = shared_bias(by_distance, torch.randn(1, 20, 8), ScoreMask(), 4)
    query = torch.randn(1, 2, 20, 4)
    mask = AttentionMask().resolve(20, 20, query.device)
    outputs = [attend_reference(query, query, query, mask, Scoring(bias=bias))[0] for bias in (dense, by_distance)]
    assert dense.shape == (2, 20, 20)
    assert_close(outputs[0], outputs[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("use_checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["causal", "lengths", "padding", "context"])
def test_stacks_on_a_gpu_never_write_the_bias_out(
    kind: str, use_checkpoint: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 75
    counted = torch.arange(length)
    fields: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "lengths": {"lengths": torch.tensor([length, 30])},
        "padding": {"key_padding": counted < torch.tensor([[0], [40]])},
        "context": {"context": counted.expand(2, -1) % 40 < 10, "documents": counted.expand(2, -1) // 40},
    }
    x, weights = torch.randn(2, 2, length, 32, dtype=F64, generator=torch.Generator().manual_seed(1))
    real = AttentionMask(**fields[kind]).real_keys(length).expand(2, -1)
    results = []
    for device, dtype in (("cpu", F64), ("cuda", torch.bfloat16)):
        torch.manual_seed(0)
        with use_engine(TorchEngine(device=torch.device("cpu"), use_checkpoint=use_checkpoint)):
            stack = Encoder(2, 32, 64, 4, 16, pos_bias_type="relative", dtype=F64).to(device, dtype)
            positions = RelativePositionEmbedding(4, 8, 40, True, dtype=F64).to(device, dtype)
        if device == "cuda":

            def refuse(*_: object) -> Tensor:
                raise AssertionError("the bias is written out")

            monkeypatch.setattr("model_center.layer.attention_kernels.dense_bias", refuse)
            if compiled:
                stack.compile()
        given: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in fields[kind].items()
        }
        output = stack(x.to(device, dtype), AttentionMask(**given), positions.by_distance(length, length))
        output = output.cpu().double()[real]
        table = torch.autograd.grad((output * weights[real]).sum(), list(positions.parameters()))[0]
        results.append((output.detach(), table.cpu().double()))
    for mine, expected in zip(results[1], results[0], strict=True):
        assert (mine - expected).norm() < 0.03 * expected.norm()
