"""Adam with decoupled weight decay for parameters of any floating-point type."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, TypeAlias, cast

import torch
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from model_center.engine.current import current_engine
from model_center.engine.optim.adam_state import AdamState, State
from model_center.engine.optim.loss_scale import LossScaler
from model_center.engine.optim.masters import joined, remainder_of
from model_center.engine.tensors import fits_one_pass, group_by_kind

INITIAL_LOSS_SCALE = 65536.0
# Parameters are updated in buckets of about this many elements, larger ones piece by piece, so that temporary float32
# gradients take little memory and transfers to the host overlap with updates there.
BUCKET_ELEMENTS = 2**24
# On a host the pieces are smaller: a processor's cache keeps them from one operation to the next. With 2**20 to 2**22
# an H200's host was twice as fast as with 2**24.
HOST_PIECE_ELEMENTS = 2**21

Bucket: TypeAlias = list[torch.nn.Parameter]

_in_order = itemgetter("exp_avg", "exp_avg_sq", "step")


class AdamOptimizer(AdamState):
    """Adam with decoupled weight decay (AdamW) and float32 arithmetic.

    Float16 and bfloat16 parameters have float32 masters in the optimizer's state; these are updated, and rounded to the
    parameter afterwards. The arithmetic is that of PyTorch's fused AdamW. Of a bfloat16 parameter's master, the state
    has the half that the parameter lacks: 10 bytes of state for each element instead of 12.

    With float16 parameters the loss must be scaled, either by an `OptimManager` or by this optimizer itself:

        loss = optimizer.loss_scale(loss)
        loss.backward()
        optim_step(optimizer, lr_scheduler)

    Source: Loshchilov and Hutter 2019. In BMTrain only half-precision parameters decay decoupled; here all do.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate, not negative.
        betas: Decay rates of the two moments, at least 0 and below 1.
        eps: Added to the denominator, not negative.
        weight_decay: Part of a parameter that a step with learning rate 1 takes away, not negative.
        hold_steps: In that many first steps moments accumulate while parameters stay.
        scale: Initial loss scale of `loss_scale`, which then adapts; by default 65536 if there are float16 parameters,
            else a constant 1.

    Raises:
        ValueError: If a value is out of range or a parameter is not of a floating-point type.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hold_steps: int = 0,
        *,
        scale: float | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay), ("hold_steps", hold_steps)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be a finite number of at least 0, but is {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` must be two numbers of at least 0 and below 1, but is {betas}")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.scaler = LossScaler(1.0 if scale is None else scale, enabled=scale is not None)
        super().__init__(params, {**options, "hold_steps": hold_steps, "steps": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as in PyTorch. With the first float16 parameters the loss scale begins to adapt.

        Raises:
            ValueError: If a parameter is not of a floating-point type.
        """
        super().add_param_group(param_group)
        added = self.param_groups[-1]["params"]
        dtypes = {parameter.dtype for parameter in added}
        if wrong := [dtype for dtype in dtypes if not dtype.is_floating_point]:
            del self.param_groups[-1]
            raise ValueError(f"`params` must be of floating-point types, but there are some of {wrong[0]}")
        if torch.float16 in dtypes and not self.scaler.enabled:
            self.scaler = LossScaler(INITIAL_LOSS_SCALE)
        # Before the first backward pass, so that an engine of several processes sees each gradient come.
        current_engine().adopt(added)

    @property
    def scale(self) -> float:
        """The loss scale that `loss_scale` applies now."""
        return self.scaler.scale

    def loss_scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss to call `backward` on: scaled, and averaged over processes. For use with `optim_step`."""
        return loss * (self.scale / current_engine().gradient_divisor)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, scale: float = 1.0) -> float | None:  # type: ignore[override]
        """Updates all parameters that have a gradient.

        Args:
            closure: Computes the loss (and gradients) again and returns it.
            scale: The loss scale that the gradients carry.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = current_engine()
        engine.before_update_of(self.param_groups)
        work: list[tuple[dict[str, Any], Bucket]] = []
        for group in self.param_groups:
            others = self._update_in_one_pass(group, scale)
            work += [(group, bucket) for same in group_by_kind(others) for bucket in buckets_of(same)]
        for (group, bucket), gradients in zip(work, self._fetch([bucket for _, bucket in work]), strict=True):
            self._update_bucket(group, bucket, gradients, scale)
        for group in self.param_groups:
            group["steps"] += 1
        engine.after_update()
        return loss

    def _update_in_one_pass(self, group: dict[str, Any], scale: float) -> Bucket:
        """Updates the parameters of a group that one kernel takes; returns the others that have a gradient."""
        local = current_engine().local
        others: Bucket = []
        operands: list[tuple[torch.Tensor, ...]] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self._state_of(parameter)
            held, gradient = local(parameter), local(parameter.grad)
            master = _master_in(state)
            if master is not None and gradient.dtype == held.dtype and fits_one_pass(held, gradient, *state.values()):
                operands.append((held, gradient, master, *_in_order(state)))
            else:
                others.append(parameter)
        if operands:
            from model_center.engine.optim import kernels  # where there is Triton

            options = {name: group[name] for name in ("betas", "eps", "weight_decay")}
            kernels.update(*zip(*operands, strict=True), lr=_rate(group), scale=scale, **options)
        return others

    def _update_bucket(
        self, group: dict[str, Any], bucket: Bucket, gradients: list[torch.Tensor], scale: float
    ) -> None:
        """Updates parameters of one type on one device."""
        states = [self._state_of(parameter) for parameter in bucket]
        names = [name for name in ("exp_avg", "exp_avg_sq", "master", "remainder") if name in states[0]]
        outlets = [self._outlet(parameter) for parameter in bucket]
        operands = [gradients, outlets, *([state[name] for state in states] for name in names)]
        steps = [state["step"] for state in states]
        for indices, piece in _pieces(operands):
            self._update_piece(group, piece, [steps[index].clone() for index in indices], scale)
        torch._foreach_add_(steps, 1)
        self._publish(bucket)

    def _update_piece(
        self, group: dict[str, Any], operands: Sequence[list[torch.Tensor]], steps: list[torch.Tensor], scale: float
    ) -> None:
        """Updates masters and rounds them to the outlets, or updates parameters that are their own masters."""
        gradients, outlets, exp_avgs, exp_avg_sqs, *rest = operands
        (targets,) = rest or [outlets]
        remainders = targets if targets[0].dtype is torch.int16 else []
        if remainders:
            targets = [joined(*halves) for halves in zip(outlets, remainders, strict=True)]
        # What is divided is a copy, and it is the only one.
        converted = [
            _laid_out_as(target, gradient.to(target.dtype, copy=scale != 1))
            for gradient, target in zip(gradients, targets, strict=True)
        ]
        if scale != 1:
            torch._foreach_div_(converted, scale)
        adamw(
            targets,
            converted,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=_rate(group),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if targets is not outlets:
            torch._foreach_copy_(outlets, targets)
        if remainders:
            torch._foreach_copy_(remainders, [remainder_of(*each) for each in zip(outlets, targets, strict=True)])

    def _fetch(self, buckets: list[Bucket]) -> Iterator[list[torch.Tensor]]:
        """The gradients of each bucket, on the device of the state."""
        for bucket in buckets:
            yield [local_gradient(parameter) for parameter in bucket]

    def _outlet(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """Where a parameter's new value is written, on the device of the state."""
        return current_engine().local(parameter)

    def _publish(self, bucket: Bucket) -> None:
        """Takes new values from their outlets to the parameters."""


def buckets_of(parameters: Iterable[torch.nn.Parameter]) -> Iterator[Bucket]:
    """About `BUCKET_ELEMENTS` held elements at a time."""
    bucket: Bucket = []
    elements = 0
    for parameter in parameters:
        held = current_engine().local(parameter).numel()
        if bucket and elements + held > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += held
    if bucket:
        yield bucket


def _master_in(state: State) -> torch.Tensor | None:
    """A half-precision parameter's master, or what is kept of it."""
    return state["remainder"] if "remainder" in state else state.get("master")


def _rate(group: Mapping[str, Any]) -> float:
    """The learning rate of this step."""
    rate: float = group["lr"] if group["steps"] >= group["hold_steps"] else 0.0
    return rate


def _pieces(operands: Sequence[list[torch.Tensor]]) -> Iterator[tuple[list[int], Sequence[list[torch.Tensor]]]]:
    """Those of a bucket a piece at a time, with the place in it of each tensor; large tensors come in rows.

    Unless rows of theirs would not be dense, as those of a transposed one.
    """
    most = BUCKET_ELEMENTS if operands[-1][0].is_cuda else HOST_PIECE_ELEMENTS
    piece: list[tuple[int, tuple[torch.Tensor, ...]]] = []
    elements = 0
    for index, tensors in enumerate(zip(*operands, strict=True)):
        size = tensors[0].numel()
        whole = size <= most or not all(tensor.is_contiguous() for tensor in tensors[1:])
        rows = len(tensors[0]) if whole else max(1, most * len(tensors[0]) // size)
        for parts in [tensors] if whole else zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            if piece and elements + parts[0].numel() > most:
                yield _columns(piece)
                piece, elements = [], 0
            piece.append((index, parts))
            elements += parts[0].numel()
    yield _columns(piece)


def _columns(piece: list[tuple[int, tuple[torch.Tensor, ...]]]) -> tuple[list[int], Sequence[list[torch.Tensor]]]:
    indices, parts = zip(*piece, strict=True)
    return list(indices), [list(column) for column in zip(*parts, strict=True)]


def _laid_out_as(target: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient in the order of the target's memory, which PyTorch's fused AdamW needs on GPUs."""
    return gradient if gradient.stride() == target.stride() else torch.empty_like(target).copy_(gradient)


def local_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this process holds of a parameter's gradient."""
    return current_engine().local(cast(torch.Tensor, parameter.grad))
