"""Backward pass of attention: each gradient has one program that sums it, in one order, so it is bit-repeatable."""

# Triton compiles these functions and knows no annotations of its own values.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from model_center.layer.kernels.tiles import (
    KEYS_BY_GROUP,
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


@triton.jit(do_not_specialize=RUN_TIME)
def delta_kernel(
    output_ptr, gradient_ptr, delta_ptr, cumulative_ptr,
    stride_ob, stride_o, stride_oh, stride_gb, stride_g, stride_gh, len_q, heads,
    DIM: tl.constexpr, DIM_TILE: tl.constexpr, TILE_Q: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Products of outputs and their gradients, summed over the head: what each row's softmax takes off."""
    sequence, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row, start, limit_q, _ = place(sequence, cumulative_ptr, cumulative_ptr, len_q, len_q, False, PACKED)
    rows = tl.program_id(0) * TILE_Q + tl.arange(0, TILE_Q)
    dims = tl.arange(0, DIM_TILE)
    output_ptr += row * stride_ob + start * stride_o + head * stride_oh
    gradient_ptr += row * stride_gb + start * stride_g + head * stride_gh
    output = load_rows(output_ptr, rows, limit_q, stride_o, dims, DIM, DIM_TILE, True).to(tl.float32)
    gradient = load_rows(gradient_ptr, rows, limit_q, stride_g, dims, DIM, DIM_TILE, True).to(tl.float32)
    delta = tl.sum(output * gradient, 1)
    tl.store(delta_ptr + tl.cast(tl.program_id(1), tl.int64) * len_q + rows, delta, mask=rows < limit_q)


@triton.jit
def _key_value_tiles(
    begin, end, key, value, columns, key_gradient, value_gradient,
    query_ptr, gradient_ptr, bias_of_column, mask_ptr, log_sum_ptr, delta_ptr, stride_q, stride_g, stride_mask,
    limit_q, limit_k, scale, seed, head, dropout_p, dims,
    DIM: tl.constexpr, DIM_TILE: tl.constexpr, TILE_Q: tl.constexpr, KEYS: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, DROPS: tl.constexpr, EVEN_Q: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what queries `begin` to `end` contribute; `MASKED` says whether some of them may not attend some keys."""
    for start in range(begin, end, TILE_Q):
        rows = start + tl.arange(0, TILE_Q)
        query = load_rows(query_ptr, rows, limit_q, stride_q, dims, DIM, DIM_TILE, not EVEN_Q)
        scores = tl.dot(key, tl.trans(query)) * scale
        if HAS_BIAS:
            scores += read(settled(bias_of_column - start)[:, None] - tl.arange(0, TILE_Q)[None, :])
        # Rows of padding have an infinite sum, so no probability.
        log_sum = tl.load(log_sum_ptr + rows, mask=rows < limit_q, other=float("inf"))
        weights = weights_of(scores, log_sum[None, :])
        if MASKED:
            allowed = may_attend(
                rows[None, :], columns[:, None], limit_q, limit_k, mask_ptr, stride_mask, KEYS, IS_CAUSAL
            )
            weights = tl.where(allowed, weights, 0.0)
        gradient = load_rows(gradient_ptr, rows, limit_q, stride_g, dims, DIM, DIM_TILE, not EVEN_Q)
        weight_gradient = tl.dot(value, tl.trans(gradient))
        if DROPS:
            kept = keep(seed, head, rows[None, :], columns[:, None], dropout_p)
            dropped = tl.where(kept, weights / (1.0 - dropout_p), 0.0)
            weight_gradient = tl.where(kept, weight_gradient / (1.0 - dropout_p), 0.0)
        else:
            dropped = weights
        value_gradient = tl.dot(dropped.to(gradient.dtype), gradient, value_gradient)
        delta = tl.load(delta_ptr + rows, mask=rows < limit_q, other=0.0)
        score_gradient = weights * (weight_gradient - delta[None, :])
        key_gradient = tl.dot(score_gradient.to(query.dtype), query, key_gradient)
    return key_gradient, value_gradient


@triton.jit(do_not_specialize=RUN_TIME)
def key_value_kernel(
    query_ptr, key_ptr, value_ptr, gradient_ptr, bias_ptr, lengths_ptr, mask_ptr, bounds_ptr, cumulative_ptr, seed_ptr,
    log_sum_ptr, delta_ptr, key_gradient_ptr, value_gradient_ptr,
    stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh, stride_vb, stride_v, stride_vh,
    stride_gb, stride_g, stride_gh, stride_db, stride_d, stride_dh, stride_bias, stride_mask_b, stride_mask,
    len_q, len_k, heads, scale, dropout_p,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_TILE: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    LENGTHS: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DROPS: tl.constexpr, EVEN_Q: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values of one head; `heads` are those of keys, each for GROUP of queries."""
    tile, sequence, kv_head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    row, start, limit_q, limit_k = place(sequence, cumulative_ptr, lengths_ptr, len_q, len_k, LENGTHS, PACKED)
    first = tile * TILE_K
    room = limit_k if PACKED else len_k
    if first >= room:
        return
    columns = first + tl.arange(0, TILE_K)
    dims = tl.arange(0, DIM_TILE)
    key_ptr += row * stride_kb + start * stride_k + kv_head * stride_kh
    value_ptr += row * stride_vb + start * stride_v + kv_head * stride_vh
    mask_ptr += row * stride_mask_b
    seed = tl.load(seed_ptr) if DROPS else 0
    key = load_rows(key_ptr, columns, limit_k, stride_k, dims, DIM, DIM_TILE, True)
    value = load_rows(value_ptr, columns, limit_k, stride_v, dims, DIM, DIM_TILE, True)
    key_gradient = tl.zeros([TILE_K, DIM_TILE], tl.float32)
    value_gradient = tl.zeros([TILE_K, DIM_TILE], tl.float32)
    context_end, alike = bounds_of(row, bounds_ptr, len_q, KEYS)
    end = limit_q if first < limit_k else 0
    # Which queries are the first to attend any of the keys, and all of them.
    begin, crossing = 0, 0
    if IS_CAUSAL:
        begin = tl.where(first < context_end, 0, (first // TILE_Q) * TILE_Q)
        crossing = tl.cdiv(tl.maximum(first + TILE_K, context_end), TILE_Q) * TILE_Q
    if KEYS == KEYS_BY_GROUP:
        crossing = tl.where(alike < len_q, end, crossing)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        numbered = sequence * heads * GROUP + head
        of_row = tl.cast(numbered, tl.int64) * len_q
        head_query_ptr = query_ptr + row * stride_qb + start * stride_q + head * stride_qh
        head_gradient_ptr = gradient_ptr + row * stride_gb + start * stride_g + head * stride_gh
        bias_of_column = bias_ptr + head * stride_bias + MARGIN + len_q - 1 + columns
        if IS_CAUSAL or KEYS == KEYS_BY_GROUP:
            key_gradient, value_gradient = _key_value_tiles(
                begin, tl.minimum(crossing, end), key, value, columns, key_gradient, value_gradient,
                head_query_ptr, head_gradient_ptr, bias_of_column, mask_ptr, log_sum_ptr + of_row, delta_ptr + of_row,
                stride_q, stride_g, stride_mask, limit_q, limit_k, scale, seed, numbered, dropout_p, dims,
                DIM, DIM_TILE, TILE_Q, KEYS, HAS_BIAS, IS_CAUSAL, DROPS, EVEN_Q, True,
            )  # fmt: skip
        key_gradient, value_gradient = _key_value_tiles(
            crossing, end, key, value, columns, key_gradient, value_gradient,
            head_query_ptr, head_gradient_ptr, bias_of_column, mask_ptr, log_sum_ptr + of_row, delta_ptr + of_row,
            stride_q, stride_g, stride_mask, limit_q, limit_k, scale, seed, numbered, dropout_p, dims,
            DIM, DIM_TILE, TILE_Q, KEYS, HAS_BIAS, IS_CAUSAL, DROPS, EVEN_Q, False,
        )  # fmt: skip
    # A key's row of scores concerns no other key's gradient, so keys that may not be attended are left out only here.
    real = columns < limit_k
    if KEYS == KEYS_BY_MASK:
        real &= tl.load(mask_ptr + columns * stride_mask, mask=real, other=0) != 0
    key_gradient = tl.where(real[:, None], key_gradient * scale, 0.0)
    value_gradient = tl.where(real[:, None], value_gradient, 0.0)
    offset = row * stride_db + start * stride_d + kv_head * stride_dh
    store_rows(key_gradient_ptr + offset, key_gradient, columns, room, stride_d, dims, DIM)
    store_rows(value_gradient_ptr + offset, value_gradient, columns, room, stride_d, dims, DIM)


@triton.jit
def _score_gradient(
    query, gradient, key, value, rows, columns, log_sum, delta, bias_of_row, mask_ptr, stride_mask, limit_q, limit_k,
    scale, seed, head, dropout_p, TILE_K: tl.constexpr,
    KEYS: tl.constexpr, HAS_BIAS: tl.constexpr, IS_CAUSAL: tl.constexpr, DROPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores of one tile, (queries, keys); `bias_of_row` points to the bias of its first key."""
    scores = tl.dot(query, tl.trans(key)) * scale
    if HAS_BIAS:
        scores += read(settled(bias_of_row)[:, None] + tl.arange(0, TILE_K)[None, :])
    weights = weights_of(scores, log_sum[:, None])
    if MASKED:
        allowed = may_attend(rows[:, None], columns[None, :], limit_q, limit_k, mask_ptr, stride_mask, KEYS, IS_CAUSAL)
        weights = tl.where(allowed, weights, 0.0)
    weight_gradient = tl.dot(gradient, tl.trans(value))
    if DROPS:
        kept = keep(seed, head, rows[:, None], columns[None, :], dropout_p)
        weight_gradient = tl.where(kept, weight_gradient / (1.0 - dropout_p), 0.0)
    return weights * (weight_gradient - delta[:, None])


@triton.jit
def _query_tiles(
    begin, end, query, gradient, rows, log_sum, delta, query_gradient,
    key_ptr, value_ptr, bias_of_row, mask_ptr, stride_k, stride_v, stride_mask, limit_q, limit_k, scale,
    seed, head, dropout_p, dims,
    DIM: tl.constexpr, DIM_TILE: tl.constexpr, TILE_K: tl.constexpr, KEYS: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, DROPS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what keys `begin` to `end` contribute; `MASKED` says whether some of them may not be attended."""
    for start in range(begin, end, TILE_K):
        columns = start + tl.arange(0, TILE_K)
        key = load_rows(key_ptr, columns, limit_k, stride_k, dims, DIM, DIM_TILE, MASKED)
        value = load_rows(value_ptr, columns, limit_k, stride_v, dims, DIM, DIM_TILE, MASKED)
        score_gradient = _score_gradient(
            query, gradient, key, value, rows, columns, log_sum, delta, bias_of_row + start, mask_ptr, stride_mask,
            limit_q, limit_k, scale, seed, head, dropout_p, TILE_K, KEYS, HAS_BIAS, IS_CAUSAL, DROPS, MASKED,
        )  # fmt: skip
        query_gradient = tl.dot(score_gradient.to(key.dtype), key, query_gradient)
    return query_gradient


@triton.jit(do_not_specialize=RUN_TIME)
def query_kernel(
    query_ptr, key_ptr, value_ptr, gradient_ptr, bias_ptr, lengths_ptr, mask_ptr, bounds_ptr, cumulative_ptr, seed_ptr,
    log_sum_ptr, delta_ptr, query_gradient_ptr,
    stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh, stride_vb, stride_v, stride_vh,
    stride_gb, stride_g, stride_gh, stride_db, stride_d, stride_dh, stride_bias, stride_mask_b, stride_mask,
    len_q, len_k, heads, scale, dropout_p,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_TILE: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    LENGTHS: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, IS_CAUSAL: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    """Gradient of one tile of queries of one head."""
    tile, sequence, head = tl.program_id(0), tl.program_id(1) // heads, tl.program_id(1) % heads
    row, start, limit_q, limit_k = place(sequence, cumulative_ptr, lengths_ptr, len_q, len_k, LENGTHS, PACKED)
    first = tile * TILE_Q
    if first >= limit_q:
        return
    kv_head = head // GROUP
    rows = first + tl.arange(0, TILE_Q)
    dims = tl.arange(0, DIM_TILE)
    query_ptr += row * stride_qb + start * stride_q + head * stride_qh
    gradient_ptr += row * stride_gb + start * stride_g + head * stride_gh
    key_ptr += row * stride_kb + start * stride_k + kv_head * stride_kh
    value_ptr += row * stride_vb + start * stride_v + kv_head * stride_vh
    bias_of_row = bias_ptr + head * stride_bias + MARGIN + len_q - 1 - rows
    mask_ptr += row * stride_mask_b
    of_row = tl.cast(tl.program_id(1), tl.int64) * len_q
    seed = tl.load(seed_ptr) if DROPS else 0
    query = load_rows(query_ptr, rows, limit_q, stride_q, dims, DIM, DIM_TILE, True)
    gradient = load_rows(gradient_ptr, rows, limit_q, stride_g, dims, DIM, DIM_TILE, True)
    log_sum = tl.load(log_sum_ptr + of_row + rows, mask=rows < limit_q, other=float("inf"))
    delta = tl.load(delta_ptr + of_row + rows, mask=rows < limit_q, other=0.0)
    query_gradient = tl.zeros([TILE_Q, DIM_TILE], tl.float32)
    context_end, alike = bounds_of(row, bounds_ptr, len_q, KEYS)
    end, unmasked = tile_limits(first, limit_k, context_end, alike, TILE_Q, TILE_K, KEYS, IS_CAUSAL)
    if KEYS != KEYS_BY_MASK:
        query_gradient = _query_tiles(
            0, unmasked, query, gradient, rows, log_sum, delta, query_gradient,
            key_ptr, value_ptr, bias_of_row, mask_ptr, stride_k, stride_v, stride_mask, limit_q, limit_k, scale,
            seed, tl.program_id(1), dropout_p, dims,
            DIM, DIM_TILE, TILE_K, KEYS, HAS_BIAS, IS_CAUSAL, DROPS, False,
        )  # fmt: skip
    query_gradient = _query_tiles(
        unmasked, end, query, gradient, rows, log_sum, delta, query_gradient,
        key_ptr, value_ptr, bias_of_row, mask_ptr, stride_k, stride_v, stride_mask, limit_q, limit_k, scale,
        seed, tl.program_id(1), dropout_p, dims,
        DIM, DIM_TILE, TILE_K, KEYS, HAS_BIAS, IS_CAUSAL, DROPS, True,
    )  # fmt: skip
    query_gradient_ptr += row * stride_db + start * stride_d + head * stride_dh
    store_rows(query_gradient_ptr, query_gradient * scale, rows, limit_q, stride_d, dims, DIM)
