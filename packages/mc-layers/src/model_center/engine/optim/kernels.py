"""Triton kernels that go once over the memory of all half-precision parameters, however many, in one launch.

A kernel gets a table on the device with a column for each tensor: the first of its tiles, its number of elements, and
where it and what belongs to it lie. The host would take longer to launch a kernel for each tensor than they run.
"""

# Triton compiles kernels and knows no annotations of its own values.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from array import array
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

_TILE = 2048
_COUNTS = 128
"""Few, as many GPUs are slow in float64."""
_ALIGNMENT = 16
"""Threads read several elements at once where addresses and numbers of elements are multiples of it."""
_RUN_TIME = ["tensors"]


@triton.jit
def _place(table_ptr, tensors, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    """Return the column of the tensor that this program's tile belongs to, its elements in the tile, and their mask."""
    tile = tl.program_id(0)
    low, high = 0, tensors
    while high - low > 1:  # the last column that does not begin behind this tile
        middle = (low + high) // 2
        begins_later = tl.load(table_ptr + middle) > tile
        low, high = tl.where(begins_later, low, middle), tl.where(begins_later, middle, high)
    places = (tile - tl.load(table_ptr + low)) * TILE + tl.arange(0, TILE)
    elements = tl.load(table_ptr + tensors + low)
    if ALIGNED:
        elements = tl.multiple_of(elements, 16)
    return low, places, places < elements


@triton.jit
def _pointer(table_ptr, tensors, row: tl.constexpr, column, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return where the tensor of a column lies that the table names in `row`."""
    pointer = tl.load(table_ptr + row * tensors + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _widened(values, BFLOAT16: tl.constexpr):
    """Return float32 of float16, or of the bits of bfloat16."""
    if BFLOAT16:
        widened = (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        widened = values.to(tl.float32)
    return widened


@triton.jit
def _narrowed(values, BFLOAT16: tl.constexpr):
    """Round float32 to float16, or to the bits of bfloat16: to the nearest, and from the middle to the even one."""
    if BFLOAT16:
        bits = values.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        narrowed = tl.where(values == values, rounded, 0x7FC0).to(tl.int16)
    else:
        narrowed = values.to(tl.float16)
    return narrowed


@triton.jit
def _joined(parameters, remainders):
    """Return the masters of bfloat16 parameters: what `masters.joined` says."""
    lowest = tl.where((parameters & 0x7FFF) == 0, 0, -32768)
    bits = (parameters.to(tl.int32) << 16) + tl.maximum(remainders.to(tl.int32), lowest)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _remainder_of(parameters, masters):
    """Return what is kept of the masters that bfloat16 parameters were rounded from."""
    difference = masters.to(tl.int32, bitcast=True) - (parameters.to(tl.int32) << 16)
    return tl.minimum(difference, 32767).to(tl.int16)


@triton.jit(do_not_specialize=_RUN_TIME)
def _count_kernel(table_ptr, corrections_ptr, tensors, log_beta1, log_beta2, COUNTS: tl.constexpr):
    columns = tl.program_id(0) * COUNTS + tl.arange(0, COUNTS)
    there = columns < tensors
    steps = tl.load(table_ptr + 7 * tensors + columns, mask=there, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(steps, mask=there, other=0.0) + 1
    tl.store(steps, count, mask=there)
    count = count.to(tl.float64)  # float32 would lose the first steps' digits
    tl.store(corrections_ptr + 2 * columns, 1 - tl.exp(count * log_beta1), mask=there)
    tl.store(corrections_ptr + 2 * columns + 1, tl.sqrt(1 - tl.exp(count * log_beta2)), mask=there)


@triton.jit(do_not_specialize=_RUN_TIME)
def _update_kernel(
    table_ptr, corrections_ptr, tensors, lr, decay, rest1, beta2, rest2, eps, scale,
    BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = tl.int16 if BFLOAT16 else tl.float16
    MASTER: tl.constexpr = tl.int16 if BFLOAT16 else tl.float32
    column, places, inside = _place(table_ptr, tensors, ALIGNED, TILE)
    parameters = _pointer(table_ptr, tensors, 2, column, TYPE, ALIGNED) + places
    gradients = _pointer(table_ptr, tensors, 3, column, TYPE, ALIGNED) + places
    masters = _pointer(table_ptr, tensors, 4, column, MASTER, ALIGNED) + places
    exp_avgs = _pointer(table_ptr, tensors, 5, column, tl.float32, ALIGNED) + places
    exp_avg_sqs = _pointer(table_ptr, tensors, 6, column, tl.float32, ALIGNED) + places
    gradient = _widened(tl.load(gradients, mask=inside, other=0), BFLOAT16) / scale
    master = tl.load(masters, mask=inside, other=0)
    if BFLOAT16:
        master = _joined(tl.load(parameters, mask=inside, other=0), master)
    exp_avg = tl.load(exp_avgs, mask=inside, other=0.0)
    exp_avg_sq = tl.load(exp_avg_sqs, mask=inside, other=0.0)
    exp_avg += rest1 * (gradient - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * gradient * gradient
    master -= decay * master
    root = tl.sqrt(exp_avg_sq) / tl.load(corrections_ptr + 2 * column + 1)
    master -= lr / tl.load(corrections_ptr + 2 * column) * exp_avg / (root + eps)
    parameter = _narrowed(master, BFLOAT16)
    if BFLOAT16:
        master = _remainder_of(parameter, master)
    tl.store(exp_avgs, exp_avg, mask=inside)
    tl.store(exp_avg_sqs, exp_avg_sq, mask=inside)
    tl.store(masters, master, mask=inside)
    tl.store(parameters, parameter, mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def _scale_kernel(
    table_ptr, factor_ptr, tensors, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    TYPE: tl.constexpr = tl.int16 if BFLOAT16 else tl.float16
    column, places, inside = _place(table_ptr, tensors, ALIGNED, TILE)
    gradients = _pointer(table_ptr, tensors, 2, column, TYPE, ALIGNED) + places
    gradient = _widened(tl.load(gradients, mask=inside, other=0), BFLOAT16) * tl.load(factor_ptr)
    tl.store(gradients, _narrowed(gradient, BFLOAT16), mask=inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def _norm_kernel(
    table_ptr, norms_ptr, tensors,
    LARGEST: tl.constexpr, BFLOAT16: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    TYPE: tl.constexpr = tl.int16 if BFLOAT16 else tl.float16
    column, places, inside = _place(table_ptr, tensors, ALIGNED, TILE)
    gradients = _pointer(table_ptr, tensors, 2, column, TYPE, ALIGNED) + places
    gradient = _widened(tl.load(gradients, mask=inside, other=0), BFLOAT16)
    if LARGEST:  # The bits without the sign, as integers, are in the order of absolute values, with NaN above infinity.
        norm = tl.max(gradient.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    else:
        norm = tl.sqrt(tl.sum(gradient * gradient))
    tl.store(norms_ptr + tl.program_id(0), norm)


def norms(gradients: Sequence[torch.Tensor], *, largest: bool) -> torch.Tensor:
    """Norms of pieces of gradients; the norm of these is that of all gradients as one vector.

    Args:
        gradients: Float16 or bfloat16, contiguous, not all empty.
        largest: Whether to return largest absolute values (NaN where there is one) instead of Euclidean norms.

    Returns:
        Float32, one-dimensional.
    """
    found = []
    for table, tiles, options in _launches(gradients):
        found.append(torch.empty(tiles, device=table.device))
        _norm_kernel[(tiles,)](table, found[-1], table.shape[1], LARGEST=largest, **options)
    return torch.cat(found)


def multiply(gradients: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiplies gradients, in place, by a float32 scalar on their device.

    PyTorch's multi-tensor multiplication does not take a scalar of another type.

    Args:
        gradients: Float16 or bfloat16, contiguous.
        factor: What they are multiplied by, before rounding.
    """
    for table, tiles, options in _launches(gradients):
        _scale_kernel[(tiles,)](table, factor, table.shape[1], **options)


def update(
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    masters: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: Sequence[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float,
) -> None:
    """Updates parameters, masters, moments and steps as PyTorch's fused AdamW does, up to the rounding of float32.

    It reads and writes 26 bytes an element of bfloat16 and 28 of float16, where conversion of gradients, update and
    rounding of float32 masters one after the other take 46.

    Args:
        parameters: Float16 or bfloat16; they, their gradients, masters and moments are contiguous and of equal sizes.
        gradients: Of the parameters' type, `scale` times as large as they should be.
        masters: Of float16 parameters float32, what they are rounded from; of bfloat16 int16, what `masters.joined`
            needs to make that.
        exp_avgs: Float32, running means of gradients.
        exp_avg_sqs: Float32, running means of their squares.
        steps: Float32 scalars: updates before this one.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Part of a parameter that a step with learning rate 1 takes away.
        scale: The loss scale that gradients carry.
    """
    logarithms = [math.log(beta) if beta else -math.inf for beta in betas]
    numbers = (lr, lr * weight_decay, 1 - betas[0], betas[1], 1 - betas[1], eps, scale)
    for table, tiles, options in _launches(parameters, gradients, masters, exp_avgs, exp_avg_sqs, steps):
        columns = table.shape[1]
        corrections = torch.empty(columns, 2, device=table.device)
        _count_kernel[(triton.cdiv(columns, _COUNTS),)](table, corrections, columns, *logarithms, COUNTS=_COUNTS)
        _update_kernel[(tiles,)](table, corrections, columns, *numbers, **options)


def _launches(*rows: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, int, dict[str, object]]]:
    """Yields the table of each launch, the number of its tiles, and what the kernel is compiled for.

    The host does not wait for the device. A column with no elements has no tiles.

    Args:
        rows: Parameters, or gradients alone, and then what belongs to each of them.
    """
    dtypes = [tensor.dtype for tensor in rows[0]]
    sizes = [tensor.numel() for tensor in rows[0]]
    numbers = array("q", sizes + [tensor.data_ptr() for row in rows for tensor in row])
    columns = torch.frombuffer(numbers, dtype=torch.int64).view(-1, len(sizes))
    aligned = (columns % _ALIGNMENT == 0).all(0)
    device = rows[0][0].device
    for dtype in set(dtypes):
        of_type = torch.tensor([each == dtype for each in dtypes])
        for is_aligned, taken in ((True, of_type & aligned), (False, of_type & ~aligned)):
            if not taken.any():
                continue
            held = columns[:, taken]
            tiles = (held[0] + _TILE - 1) // _TILE
            ends = tiles.cumsum(0)
            table = torch.vstack((ends - tiles, held))
            if device.type == "cuda":
                table = table.pin_memory().to(device, non_blocking=True)
            yield table, int(ends[-1]), {"BFLOAT16": dtype is torch.bfloat16, "ALIGNED": is_aligned, "TILE": _TILE}
