"""Weights in 8 bits: how close they come, what they refuse, and that checkpoints don't notice."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from model_center.layer import AttentionMask, Decoder, Embedding, Encoder, Linear
from model_center.layer.weight_matrix import quantize_rows

SIZES: dict[str, Any] = {"num_layers": 2, "dim_model": 16, "dim_ff": 24, "num_heads": 2, "dim_head": 8}


@given(st.integers(0, 2**32), st.integers(-6, 4), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(deadline=None)
def test_quantized_rows_are_off_by_half_a_step(seed: int, magnitude: int, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)).mul(10**magnitude).to(dtype)
    weight[1] = 0
    codes, scale = quantize_rows(weight)
    assert codes.dtype == torch.int8
    assert scale.dtype == dtype
    assert codes.abs().amax(1).tolist() == [127, 0, 127, 127]
    error = (codes.double() * scale.double()[:, None] - weight.double()).abs()
    # Half a step; the rounding of the scale itself matters for the largest of a row.
    allowed = scale.double() * (0.5 + 127 * torch.finfo(dtype).eps)
    assert (error <= allowed[:, None]).all()


@pytest.mark.parametrize("length_scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_loads_a_float_checkpoint(bias: bool, length_scale: bool) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "bias": bias, "length_scale": length_scale}
    layer = Linear(32, 8, **options)
    small = Linear(32, 8, **options, int8=True)
    assert small.load_state_dict(layer.state_dict()) == ([], [])
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert_close(small(x), layer(x), rtol=0.0, atol=0.1)
        weight = quantize_rows(layer.weight)
        exact = torch.nn.functional.linear(x, weight[0] * weight[1][:, None]) / (32**0.5 if length_scale else 1)
        assert_close(small(x), exact + layer.bias if layer.bias is not None else exact)
    assert small.weight_codes.dtype == torch.int8


def test_embedding_looks_up_and_projects() -> None:
    layer = Embedding(11, 16, dtype=torch.float32)
    small = Embedding(11, 16, dtype=torch.float32, int8=True)
    small.load_state_dict(layer.state_dict())
    ids, x = torch.tensor([[0, 10], [3, 3]]), torch.randn(2, 16)
    with torch.no_grad():
        weight = small.state_dict()["weight"]
        assert_close(small(ids), weight[ids])
        assert_close(small.projection(x), x @ weight.T)
        assert_close(small(ids), layer(ids), rtol=0.0, atol=0.02)


@torch.no_grad()
def test_state_dicts_are_those_of_the_float_layer_and_survive_the_round_trip() -> None:
    model, small, again = (Decoder(**SIZES, dtype=torch.float32, int8=int8) for int8 in (False, True, True))
    state = model.state_dict()
    small.load_state_dict(state)
    saved = small.state_dict()
    assert {name: tensor.shape for name, tensor in saved.items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    again.load_state_dict(saved)
    buffers = dict(again.named_buffers())
    for name, buffer in small.named_buffers():
        if buffer.dtype == torch.int8:
            assert torch.equal(buffers[name], buffer)
        else:
            assert_close(buffers[name], buffer)
    model.load_state_dict(saved)
    x, causal = torch.randn(2, 5, 16), AttentionMask(causal=True)
    assert_close(model(x, causal, None, x), small(x, causal, None, x))


def test_memory_is_a_quarter_of_float32() -> None:
    sizes = {**SIZES, "dim_model": 256, "dim_ff": 512}
    model, small = (Encoder(**sizes, dtype=torch.float32, int8=int8) for int8 in (False, True))
    total, small_total = (
        sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]) for module in (model, small)
    )
    assert 0.25 < small_total / total < 0.28


def test_it_starts_from_the_same_random_weights() -> None:
    layers = []
    for int8 in (False, True):
        torch.manual_seed(0)
        layers.append(Linear(8, 4, dtype=torch.float32, init_mean=1.0, init_std=0.5, int8=int8))
    with torch.no_grad():
        assert_close(layers[1].float_weight(), layers[0].weight, rtol=0.0, atol=0.02)


def test_training_is_refused() -> None:
    model = Encoder(**SIZES, dtype=torch.float32, int8=True)
    x = torch.randn(2, 5, 16)
    message = r"`int8=True` stores its weights in 8 bits for inference and can't be trained; build .* with int8=False"
    with pytest.raises(ValueError, match=message):
        model(x, None).sum().backward()
    with pytest.raises(ValueError, match=message):
        Linear(16, 4, dtype=torch.float32, int8=True)(x).sum().backward()
    with pytest.raises(ValueError, match=message):
        Embedding(16, 4, dtype=torch.float32, int8=True)(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=message):
        model.requires_grad_()
    model.requires_grad_(False)
    with torch.no_grad():
        assert not model(x, None).requires_grad


def test_checkpoints_that_do_not_fit_are_reported() -> None:
    small = Linear(3, 2, dtype=torch.float32, int8=True)
    with pytest.raises(
        RuntimeError, match=r"size mismatch for weight: the checkpoint has \(2, 4\), the layer \(2, 3\)"
    ):
        small.load_state_dict({"weight": torch.zeros(2, 4)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        small.load_state_dict({})


def test_another_precision_can_be_asked_for_later() -> None:
    model = Encoder(**SIZES, dtype=torch.float32, int8=True).to(torch.bfloat16)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 16, dtype=torch.bfloat16), None).dtype == torch.bfloat16
