"""What the forward and backward attention kernels share: the scores of one tile of queries and keys.

Sequences lie in tensors of shape (batch, tokens, heads, dim). All of one length (`PACKED` false), each has a batch row
of its own; packed, they follow one another in the first row and `cumulative` says where.
"""

# Triton compiles these functions and knows no annotations of its own values.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
RUN_TIME = ["len_q", "len_k", "sequences", "splits", "tiles_q", "tiles_k", "stride_bias", "stride_mask_b"]
"""Arguments that change from batch to batch, for whose values no kernel is compiled again."""
MARGIN = tl.constexpr(128)
"""Room on both sides of a head's biases, so that the padding of tiles reads some number; the longest side of a tile."""
KEYS_ALL = tl.constexpr(0)
KEYS_BY_MASK = tl.constexpr(1)
"""Each key has a byte: 0 if no query may attend it."""
KEYS_BY_GROUP = tl.constexpr(2)
"""Each position has an int32, twice the number of its group, plus 1 if it is context; see `fused_attention`."""


@triton.jit
def place(sequence, cumulative_ptr, lengths_ptr, len_q, len_k, LENGTHS: tl.constexpr, PACKED: tl.constexpr):
    """Return the batch row, first token, number of queries and number of keys of a sequence."""
    if PACKED:
        start = tl.load(cumulative_ptr + sequence)
        length = tl.load(cumulative_ptr + sequence + 1) - start
        return tl.cast(0, tl.int64), tl.cast(start, tl.int64), length, length
    row, start = tl.cast(sequence, tl.int64), tl.cast(0, tl.int64)
    if LENGTHS:
        return row, start, len_q, tl.minimum(tl.load(lengths_ptr + sequence), len_k).to(tl.int32)
    return row, start, len_q, len_k


@triton.jit
def may_attend(
    q, k, limit_q, limit_k, mask_ptr, stride_mask, KEYS: tl.constexpr, IS_CAUSAL: tl.constexpr
):  # fmt: skip
    """Say which queries may attend which keys; `q` and `k` broadcast to the shape of the scores."""
    allowed = k < limit_k
    if KEYS == KEYS_BY_MASK:
        allowed &= tl.load(mask_ptr + k * stride_mask, mask=allowed, other=0) != 0
    if KEYS == KEYS_BY_GROUP:
        of_key = tl.load(mask_ptr + k * stride_mask, mask=allowed, other=0)
        of_query = tl.load(mask_ptr + q * stride_mask, mask=q < limit_q, other=0)
        allowed = allowed & (of_key >> 1 == of_query >> 1)
        if IS_CAUSAL:
            allowed = allowed & ((of_key & 1 != 0) | ((of_query & 1 == 0) & (k <= q)))
    elif IS_CAUSAL:
        allowed = allowed & (k <= q)
    return allowed


@triton.jit
def bounds_of(row, bounds_ptr, len_q, KEYS: tl.constexpr):
    """Return where the context of a batch row ends, and how many positions at its beginning are of one group."""
    if KEYS == KEYS_BY_GROUP:
        return tl.load(bounds_ptr + 2 * row), tl.load(bounds_ptr + 2 * row + 1)
    return 0, len_q


@triton.jit
def tile_limits(
    first, limit_k, context_end, alike,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, KEYS: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return where the keys end that queries from `first` on attend, and from where on some are masked for some."""
    end = limit_k
    unmasked = (limit_k // TILE_K) * TILE_K
    if IS_CAUSAL:
        end = tl.minimum(end, tl.maximum(first + TILE_Q, context_end))
        unmasked = tl.minimum(unmasked, (first // TILE_K) * TILE_K)
    if KEYS == KEYS_BY_GROUP:
        # Queries that are not context see all that comes before them in their group.
        are_alike = (first >= context_end) & (first + TILE_Q <= alike)
        unmasked = tl.where(are_alike, tl.minimum(unmasked, (alike // TILE_K) * TILE_K), 0)
    if KEYS == KEYS_BY_MASK:
        unmasked = 0
    return end, unmasked


@triton.jit
def load_rows(ptr, rows, limit, stride, dims, DIM: tl.constexpr, DIM_TILE: tl.constexpr, MASKED: tl.constexpr):
    """Load vectors `rows` of one head as (rows, DIM_TILE); zeros from row `limit` and element DIM on."""
    pointers = ptr + rows[:, None] * stride + dims[None, :]
    if MASKED:
        if DIM == DIM_TILE:
            return tl.load(pointers, mask=rows[:, None] < limit, other=0.0)
        return tl.load(pointers, mask=(rows[:, None] < limit) & (dims[None, :] < DIM), other=0.0)
    if DIM == DIM_TILE:
        return tl.load(pointers)
    return tl.load(pointers, mask=dims[None, :] < DIM, other=0.0)


@triton.jit
def store_rows(ptr, values, rows, limit, stride, dims, DIM: tl.constexpr):
    """Store (rows, DIM_TILE) as vectors `rows` of one head, up to row `limit` and element DIM."""
    pointers = ptr + rows[:, None] * stride + dims[None, :]
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=(rows[:, None] < limit) & (dims[None, :] < DIM))


@triton.jit
def read(pointers):
    """Load single numbers into whatever layout they are wanted in.

    `tl.load` would fetch them in another order into shared memory, several tiles ahead, and rearrange them there.
    """
    if INTERPRETED:
        return tl.load(pointers)
    return tl.inline_asm_elementwise("ld.global.nc.f32 $0, [$1];", "=f,l", [pointers], tl.float32, True, 1)


@triton.jit
def settled(pointers):
    """The same pointers, of which the compiler knows nothing, so that it adds columns as offsets of single loads.

    It would keep a pointer for each number of a tile, and advance them all from tile to tile.
    """
    if INTERPRETED:
        return pointers
    return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [pointers], pointers.dtype, True, 1)


@triton.jit
def weights_of(scores, offset):
    """`exp(scores - offset)`, in one multiplication and one addition."""
    return tl.exp2(scores * LOG2_E - offset * LOG2_E)


@triton.jit
def mix(x):
    """Scramble 32-bit numbers, one to one, so that each bit of `x` changes each bit of the result about half the time.

    Source: C. Wellons, hash-prospector (lowbias32).
    """
    x = x.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def keep(seed, head, q, k, dropout_p):
    """Say which probabilities dropout keeps, by nothing but sequence and head, query and key.

    Each query and each key has a number of its own, and a hash of both decides. A generator such as Philox would take
    longer than the matrix products: each thread holds many keys.
    """
    of_head = mix(seed.to(tl.uint32) ^ mix(head * 2 + 1))
    x = mix(of_head ^ (q * 2).to(tl.uint32)) ^ mix(of_head ^ (k * 2 + 1).to(tl.uint32))
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x >= tl.cast(dropout_p * 4294967296.0, tl.uint32)
