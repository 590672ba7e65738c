"""What the forward and backward attention kernels share: the scores of one tile of queries and keys.

Sequences lie in tensors of shape (batch, tokens, heads, dim). All of one length (`PACKED` false), each has a batch row
of its own; packed, they follow one another in the first row and `cumulative` says where.
"""

# Triton compiles these functions and knows no annotations of its own values.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
KEYS_ALL = tl.constexpr(0)
KEYS_BY_LENGTH = tl.constexpr(1)
KEYS_BY_MASK = tl.constexpr(2)


@triton.jit
def place(sequence, cumulative_ptr, lengths_ptr, len_q, len_k, KEYS: tl.constexpr, PACKED: tl.constexpr):
    """Return the batch row, first token, number of queries and number of keys of a sequence."""
    if PACKED:
        start = tl.load(cumulative_ptr + sequence)
        length = tl.load(cumulative_ptr + sequence + 1) - start
        return tl.cast(0, tl.int64), tl.cast(start, tl.int64), length, length
    row, start = tl.cast(sequence, tl.int64), tl.cast(0, tl.int64)
    if KEYS == KEYS_BY_LENGTH:
        return row, start, len_q, tl.minimum(tl.load(lengths_ptr + sequence), len_k).to(tl.int32)
    return row, start, len_q, len_k


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
def biased(products, q, k, bias_ptr, scale, longest_q, longest_k, HAS_BIAS: tl.constexpr):
    """Scale products and add the bias of each distance; `q` and `k` broadcast to the products' shape."""
    scores = products * scale
    if HAS_BIAS:
        # Rows and columns of padding read some other distance's bias rather than none.
        distance = tl.minimum(k, longest_k - 1) - tl.minimum(q, longest_q - 1)
        scores += tl.load(bias_ptr + longest_q - 1 + distance)
    return scores


@triton.jit
def keep(seed, head, q, k, dropout_p):
    """Say which probabilities dropout keeps, by nothing but sequence and head, query and key.

    Philox draws a number for each query and each key; a multiplicative hash of both decides. Philox for each element
    would take longer than the matrix products.
    """
    x = tl.randint(seed, q * 2 + head * 0x20000) ^ tl.randint(seed, k * 2 + 1 + head * 0x20000)
    x = x.to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return (x >> 8).to(tl.float32) >= dropout_p * 16777216.0


@triton.jit
def probabilities(scores, log_sum):
    """`exp(scores - log_sum)`."""
    return tl.exp2((scores - log_sum) * _LOG2_E)
