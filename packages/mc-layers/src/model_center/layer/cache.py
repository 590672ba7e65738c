"""Keys and values of positions that a decoder has seen, so that decoding computes each position once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.layer.checks import check_positive


class SelfAttentionCache:
    """Growing keys and values of one layer's self-attention.

    Room for `max_length` positions is made when the first ones arrive; when it is full it is doubled, so that a
    caller who knows the final length pays no copy. Rotated keys are stored rotated.
    """

    def __init__(self, max_length: int) -> None:
        self._max_length = max_length
        # Keys and values, each (batch, num_heads_kv, room, dim_head).
        self._rooms: tuple[Tensor, Tensor] | None = None
        self.length = 0
        """Number of positions stored."""

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new positions.

        Args:
            key: Shape (batch, num_heads_kv, new positions, dim_head).
            value: Same shape.

        Returns:
            All keys and all values, the new ones last. Gradients reach the new ones; cached ones are constants.
        """
        start, end = self.length, self.length + key.shape[2]
        keys, values = self._make_room(key, end)
        # `narrow` costs Python much less than a slice of the same dimension.
        keys.narrow(2, start, end - start).copy_(key.detach())
        values.narrow(2, start, end - start).copy_(value.detach())
        self.length = end
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            # The rooms are written in place later on, which autograd must not see.
            return torch.cat([keys.narrow(2, 0, start), key], 2), torch.cat([values.narrow(2, 0, start), value], 2)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def reorder(self, rows: Tensor) -> None:
        """Make row i hold what row `rows[i]` held; `rows` has shape (new batch,)."""
        if self._rooms is not None:
            keys, values = self._rooms
            self._rooms = (keys.index_select(0, rows), values.index_select(0, rows))

    def _make_room(self, key: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return rooms for at least `length` positions like those of `key`."""
        batch, heads, _, dim_head = key.shape
        if self._rooms is None:
            shape = (batch, heads, max(length, self._max_length), dim_head)
            self._rooms = (key.new_zeros(shape), key.new_zeros(shape))
        old = self._rooms[0]
        if (old.shape[:2], old.shape[3], old.dtype) != (key.shape[:2], dim_head, key.dtype):
            raise ValueError(
                f"a key-value cache continues the batch it began with, (batch, num_heads_kv, length, dim_head) = "
                f"{tuple(old.shape)} of {old.dtype}, but got keys of shape {tuple(key.shape)} of {key.dtype}"
            )
        if length > old.shape[2]:
            more = (0, 0, 0, max(length, 2 * old.shape[2]) - old.shape[2])
            self._rooms = (F.pad(self._rooms[0], more), F.pad(self._rooms[1], more))
        return self._rooms


class CrossAttentionCache:
    """Keys and values of what a decoder layer's cross-attention attends: computed once, at the first call."""

    def __init__(self) -> None:
        self._stored: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Number of positions stored, 0 before the first call."""
        return 0 if self._stored is None else self._stored[0].shape[2]

    def fetch(self) -> tuple[Tensor, Tensor] | None:
        """Return the stored keys and values, or None before the first call."""
        return self._stored

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values, shape (batch, num_heads_kv, len_k, dim_head), and return them."""
        self._stored = (key.detach(), value.detach())
        return key, value

    def reorder(self, rows: Tensor) -> None:
        """Make row i hold what row `rows[i]` held; `rows` has shape (new batch,)."""
        if self._stored is not None:
            key, value = self._stored
            self._stored = (key.index_select(0, rows), value.index_select(0, rows))


class LayerCache:
    """What one transformer block keeps between calls."""

    def __init__(self, max_length: int) -> None:
        self.self_attention = SelfAttentionCache(max_length)
        self.cross_attention = CrossAttentionCache()


class KeyValueCache:
    """Keys and values of all layers of a decoder.

    Pass one object to every call of the same decoding run: each call gives only the new positions, and the cache
    holds the rest, for `num_heads_kv` heads (unexpanded in grouped-query attention), in the type and on the device
    of the first call.

    Cached positions are constants: gradients of a call reach that call's own positions only.

    Args:
        num_layers: Number of blocks.
        max_length: Positions to make room for; the room doubles when more arrive.
    """

    def __init__(self, num_layers: int, max_length: int) -> None:
        check_positive(num_layers=num_layers, max_length=max_length)
        self.layers = [LayerCache(max_length) for _ in range(num_layers)]
        """One entry for each block, in order."""

    @property
    def length(self) -> int:
        """Number of positions decoded so far."""
        return self.layers[0].self_attention.length

    @property
    def cross_length(self) -> int:
        """Number of positions that cross-attention attends, 0 before the first call or without cross-attention."""
        return self.layers[0].cross_attention.length

    def reorder(self, rows: Tensor) -> None:
        """Make sequence i continue what sequence `rows[i]` was, as beam search does.

        Args:
            rows: Integers of shape (new batch,).
        """
        for layer in self.layers:
            layer.self_attention.reorder(rows)
            layer.cross_attention.reorder(rows)

    def truncate(self, length: int) -> None:
        """Forget all positions from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"`length` must lie between 0 and the cached length ({self.length}), but is {length}")
        for layer in self.layers:
            layer.self_attention.length = length
