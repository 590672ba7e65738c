"""Every layer under a second engine, and compiled."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_engine import FakeDistributedModule, FakeEngine
from torch import Tensor
from torch.testing import assert_close

from model_center.engine import CheckpointBlock, TorchEngine, use_engine
from model_center.layer import (
    Attention,
    AttentionMask,
    CrossAttentionBlock,
    Decoder,
    Embedding,
    Encoder,
    FeedForward,
    FFNBlock,
    LayerNorm,
    Linear,
    Module,
    RelativePositionEmbedding,
    RotaryEmbedding,
    SelfAttentionBlock,
    TransformerBlock,
)

SIZES: dict[str, Any] = {"dim_model": 8, "dim_ff": 12, "num_heads": 2, "dim_head": 4}
CAUSAL = AttentionMask(causal=True, lengths=torch.tensor([3, 2]))
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))

LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[Any, ...]]] = {
    "Linear": (lambda: Linear(8, 5, bias=True), (X,)),
    "Linear int8": (lambda: Linear(8, 5, bias=True, int8=True), (X,)),
    "Embedding": (lambda: Embedding(9, 8), (torch.tensor([[1, 8, 0]]),)),
    "RelativePositionEmbedding": (lambda: RelativePositionEmbedding(2), (3, 3)),
    "RotaryEmbedding": (lambda: RotaryEmbedding(4), (X, X)),
    "LayerNorm": (lambda: LayerNorm(8), (X,)),
    "RMS norm": (lambda: LayerNorm(8, bias=False), (X,)),
    "Attention": (
        lambda: Attention(8, 4, 2, num_heads_kv=1, pos_bias_type="rotary"),
        (X, X, CAUSAL, RotaryEmbedding(4)),
    ),
    "FeedForward": (lambda: FeedForward(8, 12), (X,)),
    "SelfAttentionBlock": (lambda: SelfAttentionBlock(8, 2, 4, norm_bias=True), (X, CAUSAL)),
    "CrossAttentionBlock": (lambda: CrossAttentionBlock(8, 2, 4, att_bias=True), (X, X, None)),
    "FFNBlock": (lambda: FFNBlock(8, 12, post_layer_norm=True), (X,)),
    "TransformerBlock": (lambda: TransformerBlock(**SIZES, is_decoder=True), (X, CAUSAL, None, X)),
    "Encoder": (lambda: Encoder(2, **SIZES, pos_bias_type="relative"), (X, None, torch.randn(2, 3, 3))),
    "Decoder": (lambda: Decoder(2, **SIZES), (X, CAUSAL, None, X, None)),
}


def run(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output (the first, of two) and the gradients of all parameters."""
    inputs = tuple(value.clone().requires_grad_() if value is X else value for value in inputs)
    output = layer(*inputs)
    first: Tensor = output[0] if isinstance(output, tuple) else output
    if getattr(layer, "int8", False):
        return first.detach(), {}
    first.square().sum().backward()
    return first.detach(), {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_under_a_second_engine(name: str) -> None:
    make, inputs = LAYERS[name]
    with use_engine(TorchEngine(torch.device("cpu"))):
        plain = make()
        expected, gradients = run(plain, inputs)
    with use_engine(FakeEngine()):
        layer = make()
        assert isinstance(layer, FakeDistributedModule) == isinstance(layer, Module)
        layer.load_state_dict(plain.state_dict())
        output, fake_gradients = run(layer, inputs)
        assert {k: v.shape for k, v in layer.state_dict().items()} == {
            k: v.shape for k, v in plain.state_dict().items()
        }
    assert_close(output, expected)
    assert fake_gradients.keys() == gradients.keys()
    for parameter, gradient in gradients.items():
        # That engine stores parameters flat, and sums the gradients of its two equal processes.
        assert_close(fake_gradients[parameter].view_as(gradient) / 2, gradient)


def test_copies_are_layers_of_the_same_engine() -> None:
    with use_engine(FakeEngine()):
        block = TransformerBlock(**SIZES)
        again = copy.deepcopy(block)
    assert type(again) is type(block)
    assert again.dim_model == 8


def test_a_subclass_may_call_super_init_late() -> None:
    class Head(Module):
        def __init__(self) -> None:
            self.dense = Linear(8, 3)
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.dense(x)
            return logits

    assert Head()(X).shape == (2, 3, 3)
    assert list(Head().state_dict()) == ["dense.weight"]


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_recomputed_blocks_give_the_same_gradients(use_checkpoint: bool) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(**SIZES, dropout_p=0.3)
    expected = copy.deepcopy(block)
    with use_engine(TorchEngine(torch.device("cpu"), use_checkpoint=use_checkpoint)):
        checkpointed = CheckpointBlock(block)
    results = []
    for layer in (expected, checkpointed):
        torch.manual_seed(1)
        results.append(run(layer, (X, CAUSAL)))
    assert_close(results[0], results[1])


def test_whole_stacks_are_pickled() -> None:
    with use_engine(TorchEngine(torch.device("cpu"), use_checkpoint=True)) as engine:
        stack = Encoder(2, **SIZES)
        again = pickle.loads(pickle.dumps(stack))
        assert_close(run(again, (X, CAUSAL)), run(stack, (X, CAUSAL)))
        before = again.layers[0].self_att.self_attention.project_q.weight.detach().clone()
        engine.init_parameters(again)
    assert not torch.equal(again.layers[0].self_att.self_attention.project_q.weight, before)


@pytest.mark.slow
def test_blocks_compile_without_a_graph_break() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(**SIZES, attn_scale=True, pos_bias_type="rotary", num_heads_kv=1, norm_bias=True)
    compiled: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
    rotary = RotaryEmbedding(4)
    mask = AttentionMask(causal=True, key_padding=torch.tensor([[False] * 3, [True, False, False]]))
    expected, gradients = run(block, (X, mask, rotary))
    block.zero_grad()
    output, compiled_gradients = run(compiled, (X, mask, rotary.positions(torch.arange(3))))
    assert_close(output, expected)
    # A compiled module's parameters have a prefix of its own.
    assert_close(list(compiled_gradients.values()), list(gradients.values()))
