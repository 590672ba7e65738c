"""Padding left out: a stack's blocks run over the real positions only, one behind another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.layer.attention_kernels import Packing
from model_center.layer.attention_mask import AttentionMask
from model_center.layer.kernels.requirements import fused_kernels_take
from model_center.layer.position import RotaryPositions

_WORTHWHILE = 0.9
"""Up to this part of real positions, work on the others costs more than moving the rows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RealPositions:
    """Where the real positions of a batch are.

    Attributes:
        indices: Their places in the flattened batch, integers of shape (tokens,).
        batch: Number of rows.
        length: Positions in a row, with padding.
        packing: Which of them attend each other: those of a row, or of a document in it.
    """

    indices: Tensor
    batch: int
    length: int
    packing: Packing

    def take(self, x: Tensor) -> Tensor:
        """Return the real positions of `x`, shape (batch, length, size), as one row (1, tokens, size)."""
        row: Tensor = x.flatten(0, 1).index_select(0, self.indices)[None]
        if not torch.compiler.is_compiling():
            # Compiled blocks then serve any number of tokens; a compiled stack finds that out by itself.
            torch._dynamo.maybe_mark_dynamic(row, 1)
        return row

    def put_back(self, row: Tensor, at_padding: Tensor) -> Tensor:
        """Return `at_padding`, (batch, length, size), with the real positions replaced by `row`, (1, tokens, size).

        No gradient goes to `at_padding`.
        """
        return at_padding.detach().flatten(0, 1).index_copy(0, self.indices, row[0]).view_as(at_padding)

    def rotations(self, positions: RotaryPositions) -> RotaryPositions:
        """Return the rotations of the real positions."""
        shape = (self.batch, self.length, -1)

        def taken(x: Tensor) -> Tensor:
            rows = x if x.dim() == 2 else x[:, 0]
            return rows.expand(shape).flatten(0, 1).index_select(0, self.indices)

        return RotaryPositions(taken(positions.cos), taken(positions.sin))


def saves_padding(hidden_states: Tensor, dim_head: int) -> bool:
    """Whether this device has the kernels that make leaving padding out a gain."""
    half = hidden_states.dtype in (torch.float16, torch.bfloat16)
    return hidden_states.is_cuda and half and fused_kernels_take(hidden_states, dim_head, heads=1)


def real_positions(mask: AttentionMask, batch: int, length: int, *, adjacent: bool) -> RealPositions | None:
    """Find the real positions of a batch; the host waits for the device once.

    Args:
        mask: What self-attention may attend.
        batch: Number of rows.
        length: Positions in a row, with padding.
        adjacent: Whether the positions of a sequence must follow one another, so that distances stay what they are.

    Returns:
        None if the mask is not one of padding and documents, a document lies in several places of its row, or there is
        so little padding that leaving it out gains nothing.
    """
    if not _is_known(mask, batch, length):
        return None
    real = mask.real_keys(length).expand(batch, length)
    begins = real & ~F.pad(real[:, :-1], (1, 0))
    documents = mask.documents
    if documents is None:
        fits = (begins.sum(1) <= 1).all() if adjacent else real.new_ones(())
    else:
        turns = documents.diff(dim=1, prepend=documents[:, :1])
        begins = real & (begins | (turns != 0))
        fits = ~(real & (turns < 0)).any()
    tokens, sequences, fitting = torch.stack([real.sum(), begins.sum(), fits.long()]).tolist()
    if not fitting or not tokens or (documents is None and tokens > _WORTHWHILE * batch * length):
        return None
    indices = torch.nonzero_static(real.flatten(), size=tokens).squeeze(1)
    if documents is None:
        ends = real.sum(1).cumsum(0)
    else:
        starts = torch.nonzero_static(begins.flatten()[indices], size=sequences).squeeze(1)
        ends = torch.cat([starts[1:], starts.new_full((1,), tokens)])
    cumulative = F.pad(ends, (1, 0)).int()
    packing = Packing(cumulative=cumulative, longest=length, is_causal=mask.causal)
    return RealPositions(indices=indices, batch=batch, length=length, packing=packing)


def _is_known(mask: AttentionMask, batch: int, length: int) -> bool:
    """Whether the mask says nothing but padding, documents and causality, of queries that are the keys."""
    if mask.dense is not None or mask.context is not None or mask.query_documents is not None or mask.query_offset:
        return False
    if mask.documents is not None and mask.key_padding is not None:
        return False
    sizes = [
        (tensor.shape[0] in (1, batch)) and (tensor.dim() == 1 or tensor.shape[1] == length)
        for tensor in (mask.lengths, mask.key_padding, mask.documents)
        if tensor is not None
    ]
    return bool(sizes) and all(sizes)
