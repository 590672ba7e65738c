"""Option groups: every option of the layers is declared here, once, with its documented default.

Blocks, stacks and model configurations inherit the groups they need and restate only a default that differs;
`select` then picks from them what a child needs. Fields that the ModelCenter 0.1 documentation does not have are
marked *added*; their defaults change nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from model_center.engine import HALF


@dataclass(kw_only=True, eq=False, repr=False)
class PrecisionOptions:
    """How weights are stored."""

    dtype: torch.dtype = HALF
    """Type of the parameters; `HALF` is the engine's half type (fp16 on CUDA, fp32 on CPU)."""
    int8: bool = False
    """Store weight matrices in 8 bits with one scale per row, for inference only."""


@dataclass(kw_only=True, eq=False, repr=False)
class ScaleOptions:
    """Scaling that keeps activations bounded whatever the width."""

    length_scale: bool = False
    """Divide the product of every linear layer by the square root of its input dimension."""


@dataclass(kw_only=True, eq=False, repr=False)
class DropoutOptions:
    """Dropout in training mode."""

    dropout_p: float = 0.0
    """Probability of dropping an element of each sub-layer's output, before it is added to the residual stream."""


@dataclass(kw_only=True, eq=False, repr=False)
class NormOptions:
    """Layer normalisations and where they stand."""

    norm_init_var: float = 1.0
    """Initial value of every normalisation weight."""
    norm_bias: bool = False
    """Layer normalisation with a bias (True) or root-mean-square normalisation without (False)."""
    norm_eps: float = 1e-5
    """Added to the variance before the square root."""
    post_layer_norm: bool = False
    """Normalise the residual stream itself, so that `x = norm(x); x + f(x)`, instead of `x + f(norm(x))`."""


@dataclass(kw_only=True, eq=False, repr=False)
class PositionOptions:
    """How attention knows about positions, and how its scores are scaled."""

    pos_bias_type: str = "none"
    """`none`, `relative` (a bias added to the scores) or `rotary` (queries and keys are rotated)."""
    attn_scale: bool = False
    """Divide scores by the square root of `dim_head` before the softmax."""
    num_heads_kv: int | None = None
    """*Added.* Heads of keys and values in grouped-query attention; None means `num_heads`."""


@dataclass(kw_only=True, eq=False, repr=False)
class AttentionOptions(PositionOptions):
    """Attention inside blocks, stacks and models."""

    att_init_mean: float = 0.0
    """Mean of the normal distribution that attention weights start from."""
    att_init_std: float = 0.02
    """Standard deviation of the normal distribution that attention weights start from."""
    att_bias: bool = False
    """Whether the four projections of attention have a bias."""
    att_mask_value: float = float("-inf")
    """Score given to masked positions before the softmax; they get no weight after it in any case."""
    att_dropout_p: float | None = None
    """*Added.* Dropout of attention probabilities; None means `dropout_p`."""


@dataclass(kw_only=True, eq=False, repr=False)
class FeedForwardOptions:
    """Feed-forward layers inside blocks, stacks and models."""

    ffn_init_mean: float = 0.0
    """Mean of the normal distribution that feed-forward weights start from."""
    ffn_init_std: float = 0.02
    """Standard deviation of the normal distribution that feed-forward weights start from."""
    ffn_bias: bool = False
    """Whether the projections of the feed-forward layer have a bias."""
    ffn_activate_fn: str = "gated_gelu"
    """Name of the activation, see `model_center.layer.ACTIVATIONS`; `gated_` in front makes it gated."""
    ffn_dropout_p: float | None = None
    """*Added.* Dropout between activation and output projection; None means `dropout_p`."""


@dataclass(kw_only=True, eq=False, repr=False)
class BlockOptions(AttentionOptions, FeedForwardOptions, NormOptions, ScaleOptions, DropoutOptions, PrecisionOptions):
    """Everything that a transformer block, and so a stack of them, can be told."""

    parallel_ffn: bool = False
    """Feed the feed-forward layer from the block's input: `x + attention(norm(x)) + ffn(norm'(x))`."""


@cache
def _parameter_names(target: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(target).parameters)


def select(target: Callable[..., Any], source: object, *, prefix: str = "", **given: Any) -> dict[str, Any]:
    """Pick from `source` the arguments that `target` takes, by name.

    An argument `name` is taken from `given`, else from the field `prefix + name` of `source` unless that is None,
    else from its field `name`, else it is left to `target`'s own default. So

    >>> Attention(**select(Attention, block, prefix="att_", dim_in=block.dim_model))  # doctest: +SKIP

    passes `block.att_bias` as `bias` and `block.num_heads` as `num_heads`.

    Args:
        target: The class (or function) to be called.
        source: An object with option fields: a block, a stack, a configuration.
        prefix: What `source` puts in front of the names that concern `target`.
        given: Arguments that `source` knows under another name; they win.

    Returns:
        Keyword arguments for `target`.
    """
    arguments = {}
    for name in _parameter_names(target):
        if name in given:
            arguments[name] = given[name]
        elif prefix and getattr(source, prefix + name, None) is not None:
            arguments[name] = getattr(source, prefix + name)
        elif hasattr(source, name):
            arguments[name] = getattr(source, name)
    return arguments
