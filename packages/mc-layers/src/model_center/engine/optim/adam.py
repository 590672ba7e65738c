"""Adam with decoupled weight decay for parameters of any floating-point type, on the device or off it."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, TypeAlias, cast

import torch
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from model_center.engine.current import current_engine
from model_center.engine.optim.loss_scale import LossScaler
from model_center.engine.tensors import group_by_kind

INITIAL_LOSS_SCALE = 65536.0
# Parameters are updated in buckets of about this many elements, so that temporary float32 gradients take little memory
# and transfers to the host overlap with updates there.
BUCKET_ELEMENTS = 2**24

Bucket: TypeAlias = list[torch.nn.Parameter]
State: TypeAlias = dict[str, torch.Tensor]


class AdamOptimizer(torch.optim.Optimizer):
    """Adam with decoupled weight decay (AdamW) and float32 arithmetic.

    Float16 and bfloat16 parameters keep float32 masters in the optimizer's state; updates happen there and are rounded
    to the parameter afterwards. The arithmetic is that of PyTorch's fused AdamW.

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
        super().__init__(params, {**options, "hold_steps": hold_steps, "steps": 0})
        dtypes = {parameter.dtype for group in self.param_groups for parameter in group["params"]}
        if wrong := [dtype for dtype in dtypes if not dtype.is_floating_point]:
            raise ValueError(f"`params` must be of floating-point types, but there are some of {wrong[0]}")
        initial = (INITIAL_LOSS_SCALE if torch.float16 in dtypes else 1.0) if scale is None else scale
        self.scaler = LossScaler(initial, enabled=scale is not None or torch.float16 in dtypes)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, as in PyTorch."""
        super().add_param_group(param_group)
        # Before the first backward pass, so that an engine of several processes sees each gradient come.
        current_engine().adopt(self.param_groups[-1]["params"])

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
        engine.before_update()
        work = [(group, bucket) for group in self.param_groups for bucket in _buckets(group["params"])]
        for bucket, gradients in zip(work, self._fetch([bucket for _, bucket in work]), strict=True):
            self._update(*bucket, gradients, scale)
        for group in self.param_groups:
            group["steps"] += 1
        engine.after_update()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Moments, masters, options and loss scale: all that training needs to go on bit by bit.

        With several processes all must call it. It is complete on rank 0, holds whole tensors, and fits any number of
        processes; on the other ranks there are no tensors in it.
        """
        engine = current_engine()
        state_dict = super().state_dict()
        parameters = _parameters(self.param_groups)
        state = {
            index: {name: _whole(parameters[index], name, tensor) for name, tensor in held.items()}
            for index, held in state_dict["state"].items()
        }
        loss_scale = self.scaler.state_dict()
        return {**state_dict, "state": state if engine.rank == 0 else {}, "loss_scale": loss_scale}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, also from the other of the two Adam optimizers.

        Args:
            state_dict: The state, complete on every process. It may lie on any device or be mapped; it is copied.

        Raises:
            ValueError: If it is not of such an optimizer or its groups and shapes are not those of this one; nothing is
                changed then.
        """
        restored = self._restore(state_dict)
        # PyTorch would convert all state, masters too, to each parameter's type: it gets the groups only.
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state.update(restored)
        if "loss_scale" in state_dict:
            self.scaler = LossScaler(**state_dict["loss_scale"])

    def _restore(self, state_dict: dict[str, Any]) -> dict[torch.Tensor, State]:
        groups = state_dict["param_groups"]
        if lacking := [name for group in groups for name in self.defaults if name not in group]:
            raise ValueError(f"the state is not that of {type(self).__name__}: its groups lack `{lacking[0]}`")
        sizes = [len(group["params"]) for group in self.param_groups]
        if (found := [len(group["params"]) for group in groups]) != sizes:
            raise ValueError(f"the state must be of parameter groups of {sizes} parameters, but is of {found}")
        indices = [index for group in groups for index in group["params"]]
        return {
            parameter: self._restore_one(parameter, index, state_dict["state"][index])
            for index, parameter in zip(indices, _parameters(self.param_groups), strict=True)
            if index in state_dict["state"]
        }

    def _restore_one(self, parameter: torch.nn.Parameter, index: int, saved: State) -> State:
        state = self._new_state(parameter)
        for name, tensor in state.items():
            if name == "master" and name not in saved:
                continue  # saved with float32 parameters: they are the masters, and may have been loaded
            expected = tuple(tensor.shape if name == "step" else parameter.shape)
            shape = tuple(saved[name].shape) if name in saved else None
            if shape != expected:
                found = "missing" if shape is None else f"of shape {shape}"
                raise ValueError(f"the state `{name}` of parameter {index} must be of shape {expected}, but is {found}")
            tensor.copy_(saved[name] if name == "step" else current_engine().part(parameter, saved[name]))
        return state

    def _update(self, group: dict[str, Any], bucket: Bucket, gradients: list[torch.Tensor], scale: float) -> None:
        for parameter in bucket:
            if not self.state[parameter]:
                self.state[parameter] = self._new_state(parameter)
        states: list[State] = [self.state[parameter] for parameter in bucket]
        local = current_engine().local
        targets = [state.get("master", local(parameter)) for state, parameter in zip(states, bucket, strict=True)]
        gradients = [gradient.to(target.dtype) for gradient, target in zip(gradients, targets, strict=True)]
        if scale != 1:
            gradients = list(torch._foreach_div(gradients, scale))
        adamw(
            targets,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"] if group["steps"] >= group["hold_steps"] else 0.0,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        with_masters = [index for index, state in enumerate(states) if "master" in state]
        self._publish([bucket[index] for index in with_masters], [targets[index] for index in with_masters])

    def _new_state(self, parameter: torch.nn.Parameter) -> State:
        device = self._state_device(parameter)
        held = current_engine().local(parameter.detach())
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        state = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(held, dtype=dtype, device=device),
            "exp_avg_sq": torch.zeros_like(held, dtype=dtype, device=device),
        }
        if dtype != parameter.dtype or device != parameter.device:
            state["master"] = held.to(device, dtype, copy=True)
        return state

    def _state_device(self, parameter: torch.nn.Parameter) -> torch.device:
        """Where the moments and the master of a parameter are kept and updated."""
        return parameter.device

    def _fetch(self, buckets: list[Bucket]) -> Iterator[list[torch.Tensor]]:
        """The gradients of each bucket, on the device of the state."""
        for bucket in buckets:
            yield [_gradient(parameter) for parameter in bucket]

    def _publish(self, parameters: Bucket, masters: list[torch.Tensor]) -> None:
        """Rounds updated masters to their parameters."""
        master_of = dict(zip(parameters, masters, strict=True))
        local = current_engine().local
        for same in group_by_kind(parameters):
            torch._foreach_copy_([local(parameter) for parameter in same], [master_of[parameter] for parameter in same])


class AdamOffloadOptimizer(AdamOptimizer):
    """`AdamOptimizer` whose masters and moments stay in the host's memory and are updated by the CPU.

    A GPU then holds 2 bytes for a half-precision parameter and 2 for its gradient, the host 12 and a pinned buffer of
    2. Gradients travel to the host while earlier ones are being worked on. For parameters that are on the CPU anyway
    there is no difference from `AdamOptimizer`.

    Source: Ren et al. 2021, "ZeRO-Offload". Takes the arguments of `AdamOptimizer`.
    """

    @cached_property
    def _buffers(self) -> dict[torch.nn.Parameter, torch.Tensor]:
        return {}

    def _state_device(self, parameter: torch.nn.Parameter) -> torch.device:  # noqa: ARG002
        return torch.device("cpu")

    def _fetch(self, buckets: list[Bucket]) -> Iterator[list[torch.Tensor]]:
        if all(parameter.device.type == "cpu" for bucket in buckets for parameter in bucket):
            yield from super()._fetch(buckets)
            return
        arrivals = []
        for bucket in buckets:
            for parameter in bucket:
                self._buffer(parameter).copy_(_gradient(parameter), non_blocking=True)
            arrivals.append(torch.cuda.current_stream(bucket[0].device).record_event())
        for bucket, arrival in zip(buckets, arrivals, strict=True):
            arrival.synchronize()
            yield [self._buffer(parameter) for parameter in bucket]

    def _publish(self, parameters: Bucket, masters: list[torch.Tensor]) -> None:
        for parameter, master in zip(parameters, masters, strict=True):
            held = current_engine().local(parameter)
            if held.device.type == "cpu":
                held.copy_(master)
            else:
                # The gradient has been read, and the next one is copied here by the same stream as this goes away.
                held.copy_(self._buffer(parameter).copy_(master), non_blocking=True)

    def _buffer(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The pinned room that a parameter's gradient comes through and its new value leaves through."""
        if parameter not in self._buffers:
            held = current_engine().local(parameter.detach())
            self._buffers[parameter] = torch.empty_like(held, device="cpu", pin_memory=True)
        return self._buffers[parameter]


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[Bucket]:
    bucket: Bucket = []
    elements = 0
    for parameter in parameters:
        if parameter.grad is None:
            continue
        held = current_engine().local(parameter).numel()
        if bucket and elements + held > BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += held
    if bucket:
        yield bucket


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return current_engine().local(cast(torch.Tensor, parameter.grad))


def _parameters(groups: Iterable[dict[str, Any]]) -> list[torch.nn.Parameter]:
    """All parameters in the order in which an optimizer's state numbers them."""
    return [parameter for group in groups for parameter in group["params"]]


def _whole(parameter: torch.nn.Parameter, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a parameter's state, gathered from all processes and then not left on the device."""
    engine = current_engine()
    if name == "step" or engine.world_size == 1:
        return tensor
    return engine.whole(parameter, tensor).cpu() if engine.rank == 0 else engine.whole(parameter, tensor)[:0]
