"""What may be attended, as a small value instead of a dense (batch, query, key) tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreMask:
    """A mask in the form that attention kernels take; made once for all blocks of a stack.

    Attributes:
        is_causal: Query i sees keys 0 to i. Excludes `allowed`.
        allowed: Boolean, broadcastable to (batch, 1, len_q, len_k), True where a query may attend a key. Queries
            that may attend nothing are opened to every key, so that no kernel divides by zero; `attends` tells them.
        attends: Boolean, broadcastable to (batch, 1, len_q, 1): False where a query may attend nothing and its
            output is zero. None where every query has something to attend.
        key_lengths: Integers of shape (1 or batch,), how many keys come before padding on the right. With `groups`, if
            there are any, it says all that `allowed` and `attends` say, to kernels that need no boolean.
        groups: int32 of shape (1 or batch, len_q), where len_q = len_k: twice the number of each position's document,
            plus 1 if it is context.
        group_bounds: int32 of shape (1 or batch, 2), what `bounds_of_groups` says of `groups`.
        groups_are_causal: Within a document, positions see context and, unless they are context, what is before them.
    """

    is_causal: bool = False
    allowed: Tensor | None = None
    attends: Tensor | None = None
    key_lengths: Tensor | None = None
    groups: Tensor | None = None
    group_bounds: Tensor | None = None
    groups_are_causal: bool = False

    @property
    def masks_keys_only(self) -> bool:
        """Whether all queries of a sequence may attend the same keys."""
        return self.allowed is None or self.allowed.shape[-2] == 1

    def dense(self, len_q: int, len_k: int, device: torch.device) -> Tensor | None:
        """Return `allowed` with causality written out, or None if nothing is masked."""
        if self.is_causal:
            return torch.ones(len_q, len_k, dtype=torch.bool, device=device).tril()
        return self.allowed


def bounds_of_groups(groups: Tensor) -> Tensor:
    """Return where each row's context ends and how many of its first positions are of one document; shape (batch, 2).

    Kernels leave out tiles by these numbers.
    """
    length = groups.shape[1]
    positions = torch.arange(length, dtype=torch.int32, device=groups.device)
    context_end = torch.where(groups & 1 != 0, positions + 1, 0).amax(1)
    alike = torch.where(groups >> 1 != groups[:, :1] >> 1, positions, length).amin(1)
    return torch.stack([context_end, alike], dim=1)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionMask:
    """What each query may attend: the conjunction of all the fields that are set.

    Everything in `model_center.layer` that takes a mask accepts this value, the documented dense tensor of shape
    (batch, len_q, len_k), or None (nothing is masked). The value keeps the structure that fast kernels need: a
    causal mask, alone or with `lengths`, costs no tensor at all, and padding costs one of shape (batch, len_k).

    Queries that are padding themselves have outputs without meaning, but always finite ones; a query that may
    attend nothing gives zeros.

    Attributes:
        causal: Query i, at position `query_offset + i`, sees keys up to its own position.
        lengths: Integers of shape (batch,): keys from this position on are padding (on the right).
        key_padding: Boolean of shape (batch, len_k), **True where the key is padding**, wherever that is.
        documents: Integers of shape (batch, len_k), the document each key belongs to in a packed row: a query
            sees only keys of its own document.
        query_documents: The same for queries, shape (batch, len_q); needed in cross-attention only, otherwise
            queries are the keys from position `query_offset` on.
        context: Boolean of shape (batch, len_k): prefix that every query sees. The other positions see each other
            causally, and context sees context only (CPM-1). Implies causality.
        query_offset: Position of the first query among the keys, the number of cached tokens in decoding.
        dense: Boolean of shape (batch or 1, len_q, len_k), True where attention is allowed; the last resort.
    """

    causal: bool = False
    lengths: Tensor | None = None
    key_padding: Tensor | None = None
    documents: Tensor | None = None
    query_documents: Tensor | None = None
    context: Tensor | None = None
    query_offset: int = 0
    dense: Tensor | None = None

    def __post_init__(self) -> None:
        for name, dim, dtype in (
            ("lengths", 1, "an integer"),
            ("key_padding", 2, "a boolean"),
            ("documents", 2, "an integer"),
            ("query_documents", 2, "an integer"),
            ("context", 2, "a boolean"),
            ("dense", 3, "a boolean"),
        ):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            is_boolean = tensor.dtype == torch.bool
            if tensor.dim() != dim or is_boolean != (dtype == "a boolean") or tensor.dtype.is_floating_point:
                raise ValueError(
                    f"`{name}` of an AttentionMask must be {dtype} tensor with {dim} dimension{'s' * (dim > 1)}, "
                    f"but is {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        if self.query_documents is not None and self.documents is None:
            raise ValueError(
                "`query_documents` must be given together with `documents`, those of the keys, or not at all"
            )
        if self.query_offset < 0:
            raise ValueError(f"`query_offset` must not be negative, but is {self.query_offset}")

    @classmethod
    def from_dense(cls, mask: Tensor) -> AttentionMask:
        """Wrap a dense mask of shape (batch or 1, len_q, len_k), boolean or of integers 0 and 1, 1 meaning attended."""
        if mask.dim() != 3 or mask.dtype.is_floating_point:
            raise ValueError(
                "a dense attention mask must be a boolean or 0/1 integer tensor of shape (batch, len_q, len_k), "
                f"but is {mask.dtype} of shape {tuple(mask.shape)}; "
                "for padding alone use AttentionMask(lengths=…) or AttentionMask(key_padding=…)"
            )
        return cls(dense=mask.bool())

    def at_offset(self, query_offset: int) -> AttentionMask:
        """Return this mask for queries that come after `query_offset` cached positions, unless it says so itself."""
        if query_offset == 0 or self.query_offset:
            return self
        return replace(self, query_offset=query_offset)

    def materialize(self, len_q: int, len_k: int, device: torch.device | None = None) -> Tensor:
        """Write the mask out.

        Args:
            len_q: Number of queries.
            len_k: Number of keys.
            device: Where to build it; by default where the mask's tensors are.

        Returns:
            Boolean of shape (batch or 1, 1, len_q, len_k), True where attention is allowed.
        """
        self._check_sizes(len_q, len_k)
        allowed = self.real_keys(len_k, device)[:, None, None, :]
        if self._is_ordered:
            allowed = allowed & self._order(len_q, len_k, allowed.device)
        if self.documents is not None:
            queries = self.query_documents
            if queries is None:
                queries = self._at_queries(self.documents, len_q)
            allowed = allowed & (queries[:, None, :, None] == self.documents[:, None, None, :])
        if self.dense is not None:
            allowed = allowed & self.dense[:, None]
        return allowed.expand(-1, 1, len_q, len_k)

    def resolve(self, len_q: int, len_k: int, device: torch.device) -> ScoreMask:
        """Put the mask into the cheapest form that a kernel takes."""
        if self.dense is None and self.documents is None and self.context is None and self.key_padding is None:
            # Right padding needs no mask under causality: real queries come before it and never see it.
            if self.causal and self.query_offset == 0:
                self._check_sizes(len_q, len_k)
                return ScoreMask(is_causal=True)
            if self.lengths is None:
                # A single cached step: the query is the last position and sees everything.
                if not self.causal or self.query_offset >= len_k - 1:
                    return ScoreMask()
                return ScoreMask(allowed=self.materialize(len_q, len_k, device))
        key_lengths = None
        if self._masks_keys_only(len_k):
            self._check_sizes(len_q, len_k)
            allowed = self.real_keys(len_k, device)[:, None, None, :]
            key_lengths = self.lengths if self.key_padding is None else None
        else:
            allowed = self.materialize(len_q, len_k, device)
        attends = allowed.any(dim=-1, keepdim=True)
        structure: dict[str, Any] = {"key_lengths": key_lengths}
        if self._is_grouped(len_q, len_k):
            groups = self._groups()
            structure = {
                "key_lengths": self.lengths,
                "groups": groups,
                "group_bounds": bounds_of_groups(groups),
                "groups_are_causal": self._is_ordered,
            }
        return ScoreMask(allowed=allowed | ~attends, attends=attends, **structure)

    @property
    def _is_ordered(self) -> bool:
        return self.causal or self.context is not None

    def _is_grouped(self, len_q: int, len_k: int) -> bool:
        """Whether documents and context, and padding on the right, are all that is masked."""
        others = (self.key_padding, self.query_documents, self.dense)
        grouped = self.documents is not None or self.context is not None
        return grouped and len_q == len_k and self.query_offset == 0 and all(other is None for other in others)

    def _groups(self) -> Tensor:
        documents = 0 if self.documents is None else 2 * self.documents.int()
        groups = documents + (0 if self.context is None else self.context.int())
        assert isinstance(groups, Tensor)
        return groups

    def _masks_keys_only(self, len_k: int) -> bool:
        unordered = not self.causal or self.query_offset >= len_k - 1
        return unordered and self.context is None and self.documents is None and self.dense is None

    def real_keys(self, len_k: int, device: torch.device | None = None) -> Tensor:
        """Return which keys are not padding: boolean of shape (batch or 1, len_k)."""
        tensors = (self.lengths, self.key_padding, self.documents, self.context, self.dense)
        device = next((tensor.device for tensor in tensors if tensor is not None), device)
        real = torch.ones(1, len_k, dtype=torch.bool, device=device)
        if self.lengths is not None:
            real = torch.arange(len_k, device=device) < self.lengths[:, None]
        if self.key_padding is not None:
            real = real & ~self.key_padding
        return real

    def _order(self, len_q: int, len_k: int, device: torch.device) -> Tensor:
        causal = torch.ones(len_q, len_k, dtype=torch.bool, device=device).tril(self.query_offset)
        if self.context is None:
            return causal
        queries = self._at_queries(self.context, len_q)
        return self.context[:, None, None, :] | (~queries[:, None, :, None] & causal)

    def _at_queries(self, of_keys: Tensor, len_q: int) -> Tensor:
        if self.query_offset + len_q > of_keys.shape[1]:
            raise ValueError(
                f"`documents` and `context` must cover `query_offset` + len_q ({self.query_offset + len_q}) positions, "
                f"but cover {of_keys.shape[1]}; for cross-attention give `query_documents`"
            )
        return of_keys[:, self.query_offset : self.query_offset + len_q]

    def _check_sizes(self, len_q: int, len_k: int) -> None:
        expected = {
            "key_padding": (len_k,),
            "documents": (len_k,),
            "context": (len_k,),
            "query_documents": (len_q,),
            "dense": (len_q, len_k),
        }
        for name, sizes in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape[1:]) != sizes:
                wanted = ", ".join(map(str, ("batch", *sizes)))
                raise ValueError(
                    f"`{name}` of the attention mask must have shape ({wanted}) for {len_q} queries and {len_k} keys, "
                    f"but has {tuple(tensor.shape)}"
                )


def resolve_mask(
    mask: AttentionMask | ScoreMask | Tensor | None,
    *,
    batch: int,
    len_q: int,
    len_k: int,
    query_offset: int,
    device: torch.device,
) -> ScoreMask:
    """Turn any accepted form of mask into what kernels take, checking it against the sizes at hand.

    Args:
        mask: An AttentionMask, a dense tensor, None, or a mask that is resolved already.
        batch: Batch size of the queries.
        len_q: Number of queries.
        len_k: Number of keys, cached ones included.
        query_offset: Number of cached positions before the first query.
        device: Where attention is computed.

    Raises:
        ValueError: A shape or dtype does not fit.
    """
    if mask is None:
        return ScoreMask()
    if isinstance(mask, ScoreMask):
        return mask
    if isinstance(mask, Tensor):
        mask = AttentionMask.from_dense(mask)
    for name in ("lengths", "key_padding", "documents", "query_documents", "context", "dense"):
        tensor = getattr(mask, name)
        if tensor is not None and tensor.shape[0] not in (1, batch):
            raise ValueError(
                f"`{name}` of the attention mask must have the batch size of the queries ({batch}) or 1, "
                f"but its shape is {tuple(tensor.shape)}"
            )
    return mask.at_offset(query_offset).resolve(len_q, len_k, device)
