"""How tests compare tensors."""

import torch
from torch import Tensor

Inputs = dict[str, Tensor]


def real(inputs: Inputs) -> Tensor:
    """Where the positions are that have logits and are not padding."""
    return inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5, scale: float | None = None) -> None:
    """Compares, relatively to the largest value."""
    largest = theirs.abs().max().item() if scale is None else scale
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * max(largest, 1e-30))
