"""Layers on a GPU: its kernels against float64, and no waiting for the device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from model_center.engine import TorchEngine, use_engine
from model_center.layer import AttentionMask, Decoder, Embedding, Encoder, RelativePositionEmbedding, RotaryEmbedding
from model_center.layer.attention_kernels import Scoring, attend, attend_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BATCH, HEADS, LENGTH, DIM = 3, 8, 75, 64  # a length that no kernel likes
CUDA = torch.device("cuda")
LENGTHS = torch.tensor([LENGTH, 30, 0])
LEFT_PADDING = torch.arange(LENGTH) < torch.tensor([[0], [40], [LENGTH]])
DOCUMENTS = torch.arange(LENGTH).expand(BATCH, -1) // 20
MASKS: dict[str, AttentionMask] = {
    "none": AttentionMask(),
    "causal": AttentionMask(causal=True),
    "lengths": AttentionMask(lengths=LENGTHS),
    "padding": AttentionMask(key_padding=LEFT_PADDING),
    "causal padding": AttentionMask(causal=True, key_padding=LEFT_PADDING),
    "causal documents": AttentionMask(causal=True, documents=DOCUMENTS),
    "context": AttentionMask(context=torch.arange(LENGTH).expand(BATCH, -1) < 20, lengths=LENGTHS),
}
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def on_cuda(mask: AttentionMask) -> AttentionMask:
    fields: dict[str, Any] = {k: v.to(CUDA) if isinstance(v, Tensor) else v for k, v in vars(mask).items()}
    return AttentionMask(**fields)


@pytest.mark.parametrize("biased", ["unbiased", "biased", "learning"])
@pytest.mark.parametrize("heads_kv", [HEADS, 2])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", MASKS)
def test_kernels_forward_and_backward(name: str, dtype: torch.dtype, heads_kv: int, biased: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(BATCH, HEADS, LENGTH, DIM), *[(BATCH, heads_kv, LENGTH, DIM)] * 2, (HEADS, LENGTH, LENGTH)]
    tensors = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    results = []
    for kind, device in ((dtype, CUDA), (torch.float64, torch.device("cpu"))):
        # Both start from the same rounded values.
        query, key, value, bias = (tensor.to(dtype).to(kind).to(device) for tensor in tensors)
        learn = [query, key, value] + ([bias] if biased == "learning" else [])
        for tensor in learn:
            tensor.requires_grad_()
        mask = (on_cuda(MASKS[name]) if device == CUDA else MASKS[name]).resolve(LENGTH, LENGTH, device)
        kernel: Any = attend if device == CUDA else attend_reference
        scoring = Scoring(bias=None if biased == "unbiased" else bias, scale=DIM**-0.5)
        output, _ = kernel(query, key, value, mask, scoring)
        output.backward(torch.ones_like(output) * torch.arange(LENGTH, device=device)[:, None] / LENGTH)
        results.append([tensor.detach().double().cpu() for tensor in (output, *(t.grad for t in learn))])
    for mine, expected in zip(*results, strict=True):
        assert mine.isfinite().all()
        assert_close(mine, expected, rtol=0.0, atol=TOLERANCES[dtype] * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_training_step_never_waits_for_the_device(dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"num_layers": 2, "dim_model": 64, "dim_ff": 128, "num_heads": 4, "dim_head": 16}
    with use_engine(TorchEngine(CUDA, use_checkpoint=True)):
        embedding = Embedding(100, 64, dtype=dtype)
        encoder = Encoder(**sizes, dtype=dtype, pos_bias_type="relative", dropout_p=0.1)
        decoder = Decoder(**sizes, dtype=dtype, pos_bias_type="rotary", num_heads_kv=2, dropout_p=0.1)
        relative = RelativePositionEmbedding(4, bidirectional=True, dtype=dtype)
    rotary = RotaryEmbedding(16)
    ids, lengths, padding = (x.to(CUDA) for x in (torch.randint(100, (BATCH, LENGTH)), LENGTHS, LEFT_PADDING))

    def step() -> None:
        x = embedding(ids)
        encoded = encoder(x, AttentionMask(lengths=lengths), relative(LENGTH, LENGTH))
        for mask in (AttentionMask(causal=True, lengths=lengths), AttentionMask(causal=True, key_padding=padding)):
            decoder(x, mask, rotary, encoded, AttentionMask(lengths=lengths)).sum().backward(retain_graph=True)

    step()  # kernels load and memory is taken
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def _float32_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.slow
@pytest.mark.usefixtures("_float32_products")
@pytest.mark.parametrize("name", ["causal", "lengths", "causal padding"])
def test_compiled_blocks(name: str) -> None:
    with use_engine(TorchEngine(CUDA)):
        torch.manual_seed(0)
        model = Encoder(1, 64, 128, 4, 16, dtype=torch.float32, pos_bias_type="rotary", attn_scale=True)
    x = torch.randn(BATCH, LENGTH, 64, device=CUDA)
    mask, rotary = on_cuda(MASKS[name]), RotaryEmbedding(16).positions(torch.arange(LENGTH, device=CUDA))
    expected = model(x, mask, rotary)
    for layer in model.layers:
        layer.compile(fullgraph=True)
    assert_close(model(x, mask, rotary), expected, rtol=1e-4, atol=1e-4)
