"""Keys and values of positions that a decoder has seen, so that decoding computes each position once."""

from __future__ import annotations

import torch
from torch import Tensor

from model_center.layer.checks import check_positive


class SelfAttentionCache:
    """Growing keys and values of one layer's self-attention.

    Room is allocated once, for `max_length` positions; when more arrive it is doubled, so that a caller who knows
    the final length pays no copy. Rotated keys are stored rotated.
    """

    def __init__(self, room: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self._keys = torch.zeros(room, dtype=dtype, device=device)
        self._values = torch.zeros(room, dtype=dtype, device=device)
        self.length = 0
        """Number of positions stored."""

    @property
    def room(self) -> int:
        """Number of positions that fit without another allocation."""
        return self._keys.shape[2]

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new positions.

        Args:
            key: Shape (batch, num_heads_kv, new positions, dim_head).
            value: Same shape.

        Returns:
            All keys and all values, the new ones last. Gradients reach the new ones; cached ones are constants.
        """
        expected = (*self._keys.shape[:2], key.shape[2], self._keys.shape[3])
        if tuple(key.shape) != expected:
            raise ValueError(
                f"the key-value cache was made for keys of shape (batch, num_heads_kv, length, dim_head) = {expected}, "
                f"but got {tuple(key.shape)}"
            )
        start, self.length = self.length, self.length + key.shape[2]
        if self.length > self.room:
            self._grow(max(self.length, 2 * self.room))
        self._keys[:, :, start : self.length] = key.detach()
        self._values[:, :, start : self.length] = value.detach()
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            # The rooms are written in place later on, which autograd must not see.
            return (
                torch.cat([self._keys[:, :, :start].to(key.dtype), key], dim=2),
                torch.cat([self._values[:, :, :start].to(value.dtype), value], dim=2),
            )
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Make row i hold what row `rows[i]` held; `rows` has shape (new batch,)."""
        self._keys = self._keys.index_select(0, rows)
        self._values = self._values.index_select(0, rows)

    def _grow(self, room: int) -> None:
        batch, heads, _, dim_head = self._keys.shape
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            new = old.new_zeros(batch, heads, room, dim_head)
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)


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

    def __init__(self, self_attention: SelfAttentionCache) -> None:
        self.self_attention = self_attention
        self.cross_attention = CrossAttentionCache()


class KeyValueCache:
    """Keys and values of all layers of a decoder.

    Pass one object to every call of the same decoding run: each call gives only the new positions, and the cache
    holds the rest. Keys and values are kept for `num_heads_kv` heads, unexpanded in grouped-query attention.

    Cached positions are constants: gradients of a call reach that call's own positions only.

    Args:
        num_layers: Number of blocks.
        batch: Number of sequences.
        num_heads_kv: Heads of keys and values.
        dim_head: Dimension of a head.
        max_length: Positions to make room for; the room doubles when more arrive.
        dtype: Type of the keys and values.
        device: Where they are kept.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads_kv: int,
        dim_head: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check_positive(
            num_layers=num_layers, batch=batch, num_heads_kv=num_heads_kv, dim_head=dim_head, max_length=max_length
        )
        room = (batch, num_heads_kv, max_length, dim_head)
        device = torch.device(device)
        self.layers = [LayerCache(SelfAttentionCache(room, dtype, device)) for _ in range(num_layers)]
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
