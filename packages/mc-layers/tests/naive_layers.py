"""Naive references: what each layer computes, written once more in the plainest way."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    mask_value: float = -math.inf,
) -> Tensor:
    """One query vector after another; shapes as in `attend`, `allowed` and `bias` expandable to the scores."""
    batch, heads, len_q, _ = query.shape
    shape = (batch, heads, len_q, key.shape[2])
    allowed = torch.ones(shape, dtype=torch.bool) if allowed is None else allowed.expand(shape)
    bias = torch.zeros(shape, dtype=query.dtype) if bias is None else bias.expand(shape)
    group = heads // key.shape[1]
    rows = []
    for b, h, i in ((b, h, i) for b in range(batch) for h in range(heads) for i in range(len_q)):
        scores = key[b, h // group] @ query[b, h, i] * scale + bias[b, h, i]
        weights = torch.exp(torch.where(allowed[b, h, i], scores, mask_value))
        weights = weights / weights.sum() if weights.sum() > 0 else weights
        rows.append(torch.where(allowed[b, h, i], weights, 0.0) @ value[b, h // group])
    return torch.stack(rows).view(batch, heads, len_q, -1)


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """`W x + b` with the weights called `name.weight` and, if there, `name.bias`."""
    product = torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"])
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float = 1e-5) -> Tensor:
    """Layer normalisation if there is a bias, root-mean-square normalisation otherwise."""
    if f"{name}.bias" not in weights:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.pow(2).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "gelu": lambda x: x * (1 + torch.special.erf(x / math.sqrt(2))) / 2,
    "gelu_new": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def feed_forward(x: Tensor, weights: dict[str, Tensor], name: str, activate_fn: str) -> Tensor:
    """The feed-forward layer called `name`."""
    act = ACTIVATIONS[activate_fn.removeprefix("gated_")]
    if activate_fn.startswith("gated_"):
        middle = act(linear(x, weights, f"{name}.w_in.w_0")) * linear(x, weights, f"{name}.w_in.w_1")
    else:
        middle = act(linear(x, weights, f"{name}.w_in.w"))
    return linear(middle, weights, f"{name}.w_out")


def attention_layer(
    x: Tensor, key_value: Tensor, weights: dict[str, Tensor], name: str, dim_head: int, allowed: Tensor | None
) -> Tensor:
    """The attention layer called `name`, scaled."""

    def heads(states: Tensor, projection: str) -> Tensor:
        projected = linear(states, weights, f"{name}.{projection}")
        return torch.stack(projected.split(dim_head, dim=-1), dim=1)

    output = attention(
        heads(x, "project_q"),
        heads(key_value, "project_k"),
        heads(key_value, "project_v"),
        allowed,
        scale=dim_head**-0.5,
    )
    return linear(torch.cat(output.unbind(1), dim=-1), weights, f"{name}.attention_out")


def block(
    x: Tensor,
    weights: dict[str, Tensor],
    dim_head: int,
    activate_fn: str,
    allowed: Tensor | None = None,
    cross: Tensor | None = None,
    post_layer_norm: bool = False,
    parallel_ffn: bool = False,
) -> Tensor:
    """A transformer block with attention scaled."""

    def add(x: Tensor, name: str, layer: Callable[[Tensor], Tensor], to: Tensor) -> Tensor:
        normed = norm(x, weights, name)
        return (normed if post_layer_norm else to) + layer(normed)

    def self_attention(states: Tensor) -> Tensor:
        return attention_layer(states, states, weights, "self_att.self_attention", dim_head, allowed)

    y = add(x, "self_att.layernorm_before_attention", self_attention, x)
    if cross is not None:

        def cross_attention(states: Tensor) -> Tensor:
            assert cross is not None
            return attention_layer(states, cross, weights, "cross_att.self_attention", dim_head, None)

        y = add(y, "cross_att.layernorm_before_attention", cross_attention, y)

    def ffn(states: Tensor) -> Tensor:
        return feed_forward(states, weights, "ffn.ffn", activate_fn)

    return add(x if parallel_ffn else y, "ffn.layernorm_before_ffn", ffn, y)
