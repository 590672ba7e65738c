"""Forward pass of attention, tile by tile, with an online softmax (Dao 2023, FlashAttention-2)."""

# Triton compiles these functions and knows no annotations of its own values.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from model_center.layer.kernels.tiles import (
    KEYS_BY_MASK,
    MARGIN,
    RUN_TIME,
    bounds_of,
    keep,
    load_rows,
    may_attend,
    place,
    read,
    settled,
    store_rows,
    tile_limits,
    weights_of,
)


@triton.jit
def _attend_tiles(
    begin, end, query, rows, accumulator, total, largest,
    key_ptr, value_ptr, bias_of_row, mask_ptr, stride_k, stride_v, stride_mask, limit_q, limit_k, scale,
    seed, head, dropout_p, dims,
    DIM: tl.constexpr, DIM_TILE: tl.constexpr, TILE_K: tl.constexpr, KEYS: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, DROPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Attend keys `begin` to `end`; `MASKED` says whether some of them may not be attended."""
    for start in range(begin, end, TILE_K):
        columns = start + tl.arange(0, TILE_K)
        key = load_rows(key_ptr, columns, limit_k, stride_k, dims, DIM, DIM_TILE, MASKED)
        scores = tl.dot(query, tl.trans(key)) * scale
        if HAS_BIAS:
            scores += read(settled(bias_of_row + start)[:, None] + tl.arange(0, TILE_K)[None, :])
        if MASKED:
            allowed = may_attend(
                rows[:, None], columns[None, :], limit_q, limit_k, mask_ptr, stride_mask, KEYS, IS_CAUSAL
            )
            scores = tl.where(allowed, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # Rows without any key so far have nothing to subtract.
        offset = tl.where(new_largest == float("-inf"), 0.0, new_largest) if MASKED else new_largest
        weights = weights_of(scores, offset[:, None])
        correction = weights_of(largest, offset)
        total = total * correction + tl.sum(weights, 1)
        accumulator *= correction[:, None]
        if DROPS:
            weights = tl.where(keep(seed, head, rows[:, None], columns[None, :], dropout_p), weights, 0.0)
        value = load_rows(value_ptr, columns, limit_k, stride_v, dims, DIM, DIM_TILE, MASKED)
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator)
        largest = new_largest
    return accumulator, total, largest


@triton.jit(do_not_specialize=RUN_TIME)
def forward_kernel(
    query_ptr, key_ptr, value_ptr, bias_ptr, lengths_ptr, mask_ptr, bounds_ptr, cumulative_ptr, seed_ptr,
    output_ptr, log_sum_ptr,
    stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh, stride_vb, stride_v, stride_vh,
    stride_ob, stride_o, stride_oh, stride_bias, stride_mask_b, stride_mask,
    len_q, len_k, heads, scale, dropout_p,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_TILE: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    LENGTHS: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    """Attend with one tile of queries of one head; keeps the logarithm of the sum of exponentials of each row."""
    tile, sequence, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    row, start, limit_q, limit_k = place(sequence, cumulative_ptr, lengths_ptr, len_q, len_k, LENGTHS, PACKED)
    first = tile * TILE_Q
    if first >= limit_q:
        return
    kv_head = head // GROUP
    rows = first + tl.arange(0, TILE_Q)
    dims = tl.arange(0, DIM_TILE)
    query_ptr += row * stride_qb + start * stride_q + head * stride_qh
    key_ptr += row * stride_kb + start * stride_k + kv_head * stride_kh
    value_ptr += row * stride_vb + start * stride_v + kv_head * stride_vh
    bias_of_row = bias_ptr + head * stride_bias + MARGIN + len_q - 1 - rows
    mask_ptr += row * stride_mask_b
    seed = tl.load(seed_ptr) if DROPS else 0
    query = load_rows(query_ptr, rows, limit_q, stride_q, dims, DIM, DIM_TILE, True)
    accumulator = tl.zeros([TILE_Q, DIM_TILE], tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    largest = tl.full([TILE_Q], float("-inf"), tl.float32)
    context_end, alike = bounds_of(row, bounds_ptr, len_q, KEYS)
    end, unmasked = tile_limits(first, limit_k, context_end, alike, TILE_Q, TILE_K, KEYS, IS_CAUSAL)
    if KEYS != KEYS_BY_MASK:
        accumulator, total, largest = _attend_tiles(
            0, unmasked, query, rows, accumulator, total, largest,
            key_ptr, value_ptr, bias_of_row, mask_ptr, stride_k, stride_v, stride_mask, limit_q, limit_k, scale,
            seed, tl.program_id(1), dropout_p, dims,
            DIM, DIM_TILE, TILE_K, KEYS, HAS_BIAS, IS_CAUSAL, DROPS, False,
        )  # fmt: skip
    accumulator, total, largest = _attend_tiles(
        unmasked, end, query, rows, accumulator, total, largest,
        key_ptr, value_ptr, bias_of_row, mask_ptr, stride_k, stride_v, stride_mask, limit_q, limit_k, scale,
        seed, tl.program_id(1), dropout_p, dims,
        DIM, DIM_TILE, TILE_K, KEYS, HAS_BIAS, IS_CAUSAL, DROPS, True,
    )  # fmt: skip
    # Queries with nothing to attend give zeros.
    attends = total > 0.0
    log_sum = tl.where(attends, largest + tl.log(total), float("inf"))
    factor = tl.where(attends, 1.0 / total, 0.0)
    if DROPS:
        factor /= 1.0 - dropout_p
    output_ptr += row * stride_ob + start * stride_o + head * stride_oh
    store_rows(output_ptr, accumulator * factor[:, None], rows, limit_q, stride_o, dims, DIM)
    tl.store(log_sum_ptr + tl.cast(tl.program_id(1), tl.int64) * len_q + rows, log_sum, mask=rows < limit_q)
