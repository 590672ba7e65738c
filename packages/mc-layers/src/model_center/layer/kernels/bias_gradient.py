"""Gradient of a bias that depends on the distance of query and key only: sums over sequences and along diagonals.

First each program sums one tile of score gradients over the sequences, in registers, and that along its diagonals;
then another kernel adds up the tiles. No sum depends on the order in which programs run.
"""

# Triton compiles these functions and knows no annotations of its own values.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from model_center.layer.kernels.backward import _score_gradient
from model_center.layer.kernels.tiles import KEYS_BY_GROUP, MARGIN, RUN_TIME, bounds_of, load_rows, place


@triton.jit(do_not_specialize=RUN_TIME)
def tile_bias_kernel(
    query_ptr, key_ptr, value_ptr, gradient_ptr, bias_ptr, lengths_ptr, mask_ptr, bounds_ptr, cumulative_ptr, seed_ptr,
    log_sum_ptr, delta_ptr, sums_ptr,
    stride_qb, stride_q, stride_qh, stride_kb, stride_k, stride_kh, stride_vb, stride_v, stride_vh,
    stride_gb, stride_g, stride_gh, stride_bias, stride_mask_b, stride_mask,
    sequences, len_q, len_k, heads, tiles_k, scale, dropout_p,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_TILE: tl.constexpr, TILE: tl.constexpr,
    LENGTHS: tl.constexpr, KEYS: tl.constexpr, PACKED: tl.constexpr, IS_CAUSAL: tl.constexpr, DROPS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Sum one tile of one head over some of the sequences, then along diagonals: (2, TILE), from the main one on."""
    tile_q, tile_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    head, split = tl.program_id(1), tl.program_id(2)
    if IS_CAUSAL and KEYS != KEYS_BY_GROUP and tile_k > tile_q:
        return
    rows = tile_q * TILE + tl.arange(0, TILE)
    columns = tile_k * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, DIM_TILE)
    kv_head = head // GROUP
    bias_of_row = bias_ptr + head * stride_bias + MARGIN + len_q - 1 - rows + tile_k * TILE
    seed = tl.load(seed_ptr) if DROPS else 0
    accumulator = tl.zeros([TILE, TILE], tl.float32)
    for sequence in range(split, sequences, tl.num_programs(2)):
        row, start, limit_q, limit_k = place(sequence, cumulative_ptr, lengths_ptr, len_q, len_k, LENGTHS, PACKED)
        is_seen = True
        if IS_CAUSAL and KEYS == KEYS_BY_GROUP:
            context_end, _ = bounds_of(row, bounds_ptr, len_q, KEYS)
            is_seen = tile_k * TILE < tl.maximum((tile_q + 1) * TILE, context_end)
        if is_seen:
            of_query = row * stride_qb + start * stride_q + head * stride_qh
            of_gradient = row * stride_gb + start * stride_g + head * stride_gh
            of_key = row * stride_kb + start * stride_k + kv_head * stride_kh
            of_value = row * stride_vb + start * stride_v + kv_head * stride_vh
            query = load_rows(query_ptr + of_query, rows, limit_q, stride_q, dims, DIM, DIM_TILE, not EVEN)
            gradient = load_rows(gradient_ptr + of_gradient, rows, limit_q, stride_g, dims, DIM, DIM_TILE, not EVEN)
            key = load_rows(key_ptr + of_key, columns, limit_k, stride_k, dims, DIM, DIM_TILE, not EVEN)
            value = load_rows(value_ptr + of_value, columns, limit_k, stride_v, dims, DIM, DIM_TILE, not EVEN)
            numbered = sequence * heads + head
            of_row = tl.cast(numbered, tl.int64) * len_q
            log_sum = tl.load(log_sum_ptr + of_row + rows, mask=rows < limit_q, other=float("inf"))
            delta = tl.load(delta_ptr + of_row + rows, mask=rows < limit_q, other=0.0)
            accumulator += _score_gradient(
                query, gradient, key, value, rows, columns, log_sum, delta, bias_of_row,
                mask_ptr + row * stride_mask_b, stride_mask, limit_q, limit_k, scale, seed, numbered, dropout_p, TILE,
                KEYS, True, IS_CAUSAL, DROPS, IS_CAUSAL or not EVEN,
            )  # fmt: skip
    # Shifting row i by i columns turns diagonals into columns; those that wrap around are TILE further back.
    i = tl.arange(0, TILE)
    reached = i[:, None] + i[None, :]
    sheared = tl.gather(accumulator, reached % TILE, 1)
    ahead = tl.sum(tl.where(reached < TILE, sheared, 0.0), 0)
    behind = tl.sum(tl.where(reached < TILE, 0.0, sheared), 0)
    place_of_tile = (split * heads + head) * tl.num_programs(0) + tl.program_id(0)
    sums_ptr += tl.cast(place_of_tile, tl.int64) * (2 * TILE)
    tl.store(sums_ptr + i, ahead)
    tl.store(sums_ptr + TILE + i, behind)


@triton.jit(do_not_specialize=RUN_TIME)
def diagonal_kernel(
    sums_ptr, bias_gradient_ptr, splits, heads, len_q, len_k, tiles_q, tiles_k,
    TILE: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """Add up, for one head, TILE neighbouring distances over all tiles and splits."""
    head = tl.program_id(1)
    # How many tiles the keys are ahead of the queries.
    ahead = tl.program_id(0) - tiles_q
    i = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for split in range(splits):
        for tile_q in range(tiles_q):
            tile_k = tile_q + ahead
            place_of_tile = tl.cast((split * heads + head) * tiles_q + tile_q, tl.int64) * tiles_k + tile_k
            tile_ptr = sums_ptr + place_of_tile * (2 * TILE)
            last = tile_q if IS_CAUSAL else tiles_k - 1
            here = (tile_k >= 0) & (tile_k <= tl.minimum(last, tiles_k - 1))
            total += tl.load(tile_ptr + i, mask=(i < TILE) & here, other=0.0)
            after = (tile_k + 1 >= 0) & (tile_k + 1 <= tl.minimum(last, tiles_k - 1))
            total += tl.load(tile_ptr + 3 * TILE + i, mask=(i < TILE) & after, other=0.0)
    column = ahead * TILE + i + len_q - 1
    distances = len_q + len_k - 1
    tl.store(bias_gradient_ptr + head * distances + column, total, mask=(column >= 0) & (column < distances))
