"""Layers whose weight is one matrix, kept in floating point or in 8 bits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.engine import Normal, current_engine, fills_parameters
from model_center.layer.module import NO_TRAINING, Module


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 8-bit codes: `weight ≈ codes * scale[:, None]`, off by at most half a scale step.

    Args:
        weight: Floating-point matrix of shape (rows, columns).

    Returns:
        Codes, int8 from -127 to 127 in the shape of `weight`, and scales of its dtype, shape (rows,).
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale = (wide.abs().amax(dim=1) / 127).to(weight.dtype)
    # A row of zeros, or one so small that its dtype has no scale for it, has codes of zero whatever the scale.
    scale = scale.masked_fill(scale == 0, 1.0)
    codes = (wide / scale.to(wide.dtype)[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes, scale


class WeightMatrix(Module):
    """Base of `Linear` and `Embedding`: a `weight` of shape (rows, columns).

    With `int8` the matrix is held as 8-bit codes and one scale per row, which takes half of fp16's memory, and is
    turned back into floating point in every forward pass. That is for inference: asking for gradients is an error.
    Names and shapes in the state dict stay those of the floating-point layer: loading quantizes, and saving writes the
    dequantized matrix, which quantizes to the same codes again (in bfloat16 to within one).
    """

    weight: torch.nn.Parameter
    weight_codes: Tensor
    weight_scale: Tensor
    int8: bool

    def make_weight(self, rows: int, columns: int, *, dtype: torch.dtype, int8: bool, mean: float, std: float) -> None:
        """Make the matrix, with normally distributed elements."""
        self.int8 = int8
        init = Normal(mean, std)
        if not int8:
            self.weight = self.parameter(rows, columns, dtype=dtype, init=init)
            return
        engine = current_engine()
        weight = torch.empty(rows, columns, dtype=engine.resolve_dtype(dtype), device=engine.device)
        if fills_parameters():
            init(weight)
            codes, scale = quantize_rows(weight)
        else:
            codes, scale = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(rows)
        self.register_parameter("weight", None)
        for name, tensor in (("weight_codes", codes), ("weight_scale", scale)):
            self.register_buffer(name, tensor, persistent=False)

    def float_weight(self) -> Tensor:
        """Return the matrix in floating point."""
        if not self.int8:
            return self.weight
        return _refuse_gradients(self.weight_codes.to(self.weight_scale.dtype) * self.weight_scale[:, None])

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows numbered `ids`, shape (…, columns), in floating point."""
        if not self.int8:
            return F.embedding(ids, self.weight)
        return _refuse_gradients(self.weight_codes[ids].to(self.weight_scale.dtype) * self.weight_scale[ids][..., None])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.int8:
            with torch.no_grad():
                destination[prefix + "weight"] = self.float_weight()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + "weight"
        if self.int8:
            if name not in state_dict:
                missing_keys.append(name)
            elif state_dict[name].shape != self.weight_codes.shape:
                error_msgs.append(
                    f"size mismatch for {name}: the checkpoint has {tuple(state_dict[name].shape)}, "
                    f"the layer {tuple(self.weight_codes.shape)}"
                )
            else:
                weight = state_dict[name].detach().to(self.weight_scale)
                for own, new in zip((self.weight_codes, self.weight_scale), quantize_rows(weight), strict=True):
                    own.copy_(new)
            state_dict = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class _RefuseGradients(torch.autograd.Function):
    """Pass the weights on, and raise when a backward pass arrives at them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, trigger: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004 - torch's signature
        raise ValueError(NO_TRAINING)


def _refuse_gradients(weight: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return weight
    trigger = torch.empty(0, device=weight.device, requires_grad=True)
    refused: Tensor = _RefuseGradients.apply(weight, trigger)  # type: ignore[no-untyped-call]
    return refused
