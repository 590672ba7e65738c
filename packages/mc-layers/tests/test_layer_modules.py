"""Linear, Embedding, LayerNorm and FeedForward against naive references, and their gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from gradients import assert_gradients, randomize
from naive_layers import feed_forward, linear, norm
from torch.testing import assert_close

from model_center.engine import use_engine
from model_center.layer import (
    ACTIVATIONS,
    DenseACT,
    DenseGatedACT,
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    Module,
)

F64 = torch.float64


@pytest.mark.parametrize("length_scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool, length_scale: bool) -> None:
    layer = Linear(5, 3, dtype=F64, bias=bias, length_scale=length_scale)
    weights = randomize(layer)
    x = torch.randn(2, 4, 5, dtype=F64)
    product = x @ weights["weight"].T / (math.sqrt(5) if length_scale else 1)
    assert_close(layer(x), product + weights["bias"] if bias else product)
    assert_gradients(layer, x)


def test_linear_starts_as_told() -> None:
    torch.manual_seed(0)
    layer = Linear(200, 300, dtype=torch.float32, init_mean=2.0, init_std=0.5, bias=True)
    assert layer.weight.mean().item() == pytest.approx(2.0, abs=0.01)
    assert layer.weight.std().item() == pytest.approx(0.5, abs=0.01)
    assert layer.bias is not None
    assert not layer.bias.any()


@pytest.mark.parametrize("length_scale", [False, True])
def test_embedding(length_scale: bool) -> None:
    layer = Embedding(7, 4, dtype=F64, length_scale=length_scale)
    weight = randomize(layer)["weight"]
    ids = torch.tensor([[0, 6, 3], [3, 3, 1]])
    assert_close(layer(ids), torch.stack([weight[i] for i in ids.flatten().tolist()]).view(2, 3, 4))
    x = torch.randn(2, 3, 4, dtype=F64)
    assert_close(layer.projection(x), x @ weight.T / (2 if length_scale else 1))
    assert_gradients(layer, ids)


def test_embedding_projection_gradients() -> None:
    class Projection(Module):
        def __init__(self) -> None:
            self.embedding = Embedding(7, 4, dtype=F64, length_scale=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.embedding.projection(x)

    assert_gradients(Projection(), torch.randn(2, 4, dtype=F64))


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(bias: bool) -> None:
    layer = LayerNorm(6, dtype=F64, bias=bias, eps=1e-3)
    weights = randomize(layer)
    x = torch.randn(2, 3, 6, dtype=F64)
    assert_close(layer(x), norm(x, {f"n.{name}": value for name, value in weights.items()}, "n", 1e-3))
    assert_gradients(layer, x)


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_does_not_overflow_in_half_precision(bias: bool) -> None:
    layer = LayerNorm(64, dtype=torch.float16, bias=bias)
    x = torch.randn(2, 64).mul(500).half()  # its squares exceed float16
    expected = norm(x.double(), {f"n.{k}": v.double() for k, v in layer.named_parameters()}, "n")
    assert layer(x).dtype == torch.float16
    assert_close(layer(x).double(), expected, rtol=2e-3, atol=2e-3)


def test_layer_norm_starts_at_init_var() -> None:
    assert LayerNorm(3, init_var=2.5).weight.tolist() == [2.5] * 3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activate_fn", [gate + name for gate in ("", "gated_") for name in ACTIVATIONS])
def test_feed_forward(activate_fn: str, bias: bool) -> None:
    layer = FeedForward(4, 6, 3, dtype=F64, activate_fn=activate_fn, bias=bias)
    weights = {f"f.{name}": value for name, value in randomize(layer).items()}
    x = torch.randn(2, 3, 4, dtype=F64)
    assert_close(layer(x), feed_forward(x, weights, "f", activate_fn))
    assert_gradients(layer, x, fast=True)


def test_feed_forward_scales_every_product_by_its_length() -> None:
    layer = FeedForward(4, 9, activate_fn="relu", dtype=F64, length_scale=True)
    weights = {f"f.{name}": value for name, value in randomize(layer).items()}
    x = torch.randn(2, 4, dtype=F64)
    middle = (linear(x, weights, "f.w_in.w") / 2).clamp(min=0)
    assert_close(layer(x), linear(middle, weights, "f.w_out") / 3)


def test_feed_forward_drops_its_middle_in_training_only() -> None:
    layer = FeedForward(4, 1000, activate_fn="relu", dtype=F64, dropout_p=0.4)
    for parameter in layer.parameters():
        torch.nn.init.ones_(parameter)
    x = torch.full((1, 4), 0.25, dtype=F64)  # every element of the middle is 1, or dropped
    assert layer.eval()(x)[0, 0] == 1000
    kept = layer.train()(x)[0, 0].item() * 0.6
    assert kept == pytest.approx(round(kept))
    assert 500 < kept < 700
    assert layer.w_in(x).sum() == 1000


def test_an_explicit_dtype_wins_and_the_default_is_the_engines() -> None:
    from model_center.engine import TorchEngine

    class HalfEngine(TorchEngine):
        half_dtype = torch.float16

    assert Linear(2, 2, dtype=torch.float16).weight.dtype == torch.float16
    with use_engine(HalfEngine(torch.device("cpu"))):
        assert Linear(2, 2).weight.dtype == torch.float16
        assert Linear(2, 2, dtype=torch.float32).weight.dtype == torch.float32
    with use_engine(TorchEngine(torch.device("cpu"))):
        assert Linear(2, 2).weight.dtype == torch.float32
        assert LayerNorm(2).weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Linear(0, 3), r"`dim_in` must be a positive integer, but is 0"),
        (lambda: LayerNorm(-1), r"`dim_norm` must be a positive integer, but is -1"),
        (lambda: Linear(5, 3)(torch.zeros(2, 4)), r"`x` must be `dim_in` \(5\), but its shape is \(2, 4\)"),
        (lambda: Linear(5, 3)(torch.tensor(1.0)), r"`x` must be `dim_in` \(5\), but its shape is \(\)"),
        (lambda: LayerNorm(5)(torch.zeros(2, 4)), r"`x` must be `dim_norm` \(5\), but its shape is \(2, 4\)"),
        (lambda: FeedForward(5, 3)(torch.zeros(4)), r"`x` must be `dim_in` \(5\), but its shape is \(4,\)"),
        (lambda: Linear(2.5, 3), r"`dim_in` must be a positive integer, but is 2.5"),  # type: ignore[arg-type]
        (lambda: DenseACT(5, 3, "gleu"), r"`activate_fn` must be one of 'relu', .*but is 'gleu'"),
        (lambda: DenseGatedACT(5, 3, "gated_relu"), r"`activate_fn` must be one of 'relu', .*but is 'gated_relu'"),
        (lambda: FeedForward(5, 3, activate_fn="tanh"), r"`activate_fn` must be one of 'relu', .*but is 'tanh'"),
        (lambda: Embedding(5, 3).projection(torch.zeros(4)), r"`x` must be `embedding_size` \(3\), but its shape is"),
        (
            lambda: Embedding(5, 3)(torch.tensor([1.0])),
            r"`ids` must be a tensor of int64 or int32, but is torch.float32",
        ),
        (
            lambda: Embedding(5, 3)(torch.tensor([[0, 4], [5, -1]])),
            r"`ids` must lie in \[0, 5\), the vocabulary, but 2 of them do not; the first is ids\[1, 0\] = 5",
        ),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_empty_batch_is_a_batch() -> None:
    assert Embedding(5, 3)(torch.empty(0, 7, dtype=torch.int64)).shape == (0, 7, 3)
