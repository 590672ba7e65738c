"""Vectors of one head, whose elements are divided into parts, because matrices on a GPU have powers of two as sizes.

Heads of 80 elements would be padded to 128; as 64 and 16 they need no padding. So some vectors are a tuple of matrices:
one of (vectors, DIM_TILE) if that is a power of two, otherwise two, which together hold DIM_TILE elements; those from
DIM on are padding.
"""

# Triton compiles these functions and knows no annotations of its own values.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl


@triton.constexpr_function
def _first_size(size):
    """The greatest power of two up to `size`."""
    return 1 << (size.bit_length() - 1)


@triton.jit
def load_rows(ptr, rows, limit, stride, DIM: tl.constexpr, DIM_TILE: tl.constexpr, MASKED: tl.constexpr):
    """Load vectors `rows`; zeros from row `limit` (if `MASKED`) and element DIM on."""
    FIRST: tl.constexpr = _first_size(DIM_TILE)
    part = _load_part(ptr, rows, limit, stride, 0, FIRST, DIM, MASKED)
    if FIRST == DIM_TILE:
        return (part,)
    else:
        return part, _load_part(ptr, rows, limit, stride, FIRST, DIM_TILE - FIRST, DIM, MASKED)


@triton.jit
def _load_part(
    ptr, rows, limit, stride, START: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr
):
    dims = START + tl.arange(0, SIZE)
    pointers = ptr + rows[:, None] * stride + dims[None, :]
    if MASKED:
        if START + SIZE <= DIM:
            return tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
        return tl.load(pointers, mask=(rows[:, None] < limit) & (dims[None, :] < DIM), other=0.0)
    if START + SIZE <= DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=dims[None, :] < DIM, other=0.0)


@triton.jit
def store_rows(ptr, parts, rows, limit, stride, DIM: tl.constexpr):
    """Store vectors `rows`, up to row `limit` and element DIM."""
    _store_part(ptr, parts[0], rows, limit, stride, 0, DIM)
    if len(parts) == 2:
        _store_part(ptr, parts[1], rows, limit, stride, parts[0].shape[1], DIM)


@triton.jit
def _store_part(ptr, part, rows, limit, stride, START: tl.constexpr, DIM: tl.constexpr):
    dims = START + tl.arange(0, part.shape[1])
    pointers = ptr + rows[:, None] * stride + dims[None, :]
    tl.store(pointers, part.to(ptr.dtype.element_ty), mask=(rows[:, None] < limit) & (dims[None, :] < DIM))


@triton.jit
def no_rows(ROWS: tl.constexpr, DIM_TILE: tl.constexpr):
    """Return zeros in float32, to which others are added."""
    FIRST: tl.constexpr = _first_size(DIM_TILE)
    part = tl.zeros([ROWS, FIRST], tl.float32)
    if FIRST == DIM_TILE:
        return (part,)
    else:
        return part, tl.zeros([ROWS, DIM_TILE - FIRST], tl.float32)


@triton.jit
def scaled(parts, factor):
    """Return the vectors times `factor`, a number or a column of one for each."""
    return [part * factor for part in parts]


@triton.jit
def selected(condition, parts):
    """Return the vectors for which `condition` holds, and zeros instead of the others."""
    return [tl.where(condition[:, None], part, 0.0) for part in parts]


@triton.jit
def products(left, right):
    """Return the product of each vector of `left` and each of `right`."""
    result = tl.dot(left[0], tl.trans(right[0]))
    if len(left) == 2:
        result = tl.dot(left[1], tl.trans(right[1]), result)
    return result


@triton.jit
def add_mixed(weights, parts, sums):
    """Return `sums` plus, for each row of `weights`, the sum of the vectors with these weights."""
    weights = weights.to(parts[0].dtype)
    total = tl.dot(weights, parts[0], sums[0])
    if len(parts) == 1:
        return (total,)
    else:
        return total, tl.dot(weights, parts[1], sums[1])
