"""Adam with decoupled weight decay for parameters of any floating-point type."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from model_center.engine.current import current_engine
from model_center.engine.optim.loss_scale import LossScaler
from model_center.engine.tensors import fits_one_pass, group_by_kind

INITIAL_LOSS_SCALE = 65536.0
# Parameters are updated in buckets of about this many elements, larger ones piece by piece, so that temporary float32
# gradients take little memory and transfers to the host overlap with updates there.
BUCKET_ELEMENTS = 2**24

# Of each parameter group; what PyTorch adds by itself is not ours to ask for.
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "hold_steps", "steps")

Bucket: TypeAlias = list[torch.nn.Parameter]
State: TypeAlias = dict[str, torch.Tensor]
ReadShard: TypeAlias = Callable[[int, str, range], torch.Tensor | None]


@dataclass(frozen=True)
class Shard:
    """What one process holds of one tensor of an optimizer's state.

    Attributes:
        index: Number of the parameter, as PyTorch counts in `state_dict`.
        name: "exp_avg", "exp_avg_sq", "master" or "step".
        start: Where `tensor` begins in the flattened whole.
        shape: Shape of the whole.
        tensor: The elements from there on, one-dimensional.
    """

    index: int
    name: str
    start: int
    shape: tuple[int, ...]
    tensor: torch.Tensor


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
        work: list[tuple[dict[str, Any], Bucket]] = []
        for group in self.param_groups:
            others = self._update_in_one_pass(group, scale)
            work += [(group, bucket) for bucket in buckets_of(others)]
        for (group, bucket), gradients in zip(work, self._fetch([bucket for _, bucket in work]), strict=True):
            self._update_bucket(group, bucket, gradients, scale)
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
        parameters = self._parameters()
        state: dict[int, State] = {}
        if engine.world_size == 1:
            for index, held in super().state_dict()["state"].items():
                state[index] = {
                    name: tensor if name == "step" else engine.whole(parameters[index], tensor)
                    for name, tensor in held.items()
                }
            return {**self.options(), "state": state}
        for index, (parameter, step) in enumerate(zip(parameters, self._steps_anywhere(), strict=True)):
            if step < 0:
                continue
            # A process that holds nothing of a parameter has no state of it, but must help to gather it.
            held = self.state.get(parameter) or self._new_state(parameter)
            whole = {name: engine.whole(parameter, tensor) for name, tensor in held.items() if name != "step"}
            if engine.rank == 0:  # and not left on the GPU
                state[index] = {name: tensor.cpu() for name, tensor in whole.items()}
                state[index]["step"] = torch.tensor(step)
        return {**self.options(), "state": state}

    def options(self) -> dict[str, Any]:
        """What `state_dict` returns, without the tensors: JSON can hold it, and it is the same on every process."""
        groups = super().state_dict()["param_groups"]
        return {"param_groups": groups, "loss_scale": self.scaler.state_dict()}

    def shards(self) -> Iterator[Shard]:
        """The state that this process holds, without communication and without copying."""
        engine = current_engine()
        for index, parameter in enumerate(self._parameters()):
            held = engine.held_range(parameter)
            state = self.state.get(parameter) if held else None
            for name, tensor in (state or {}).items():
                if name == "step":
                    yield Shard(index, name, 0, (), tensor.view(1))
                else:
                    yield Shard(index, name, held.start, tuple(engine.whole_shape(parameter)), tensor.flatten())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, also from the other of the two Adam optimizers.

        Args:
            state_dict: The state, complete on every process. It may lie on any device or be mapped; it is copied.

        Raises:
            ValueError: If it is not of such an optimizer or its groups and shapes are not those of this one; nothing is
                changed then.
        """
        engine = current_engine()
        parameters = self._parameters()

        def read(index: int, name: str, held: range) -> torch.Tensor | None:
            saved: State = state_dict["state"].get(index, {})
            if name not in saved:
                return None
            expected = () if name == "step" else tuple(engine.whole_shape(parameters[index]))
            if (shape := tuple(saved[name].shape)) != expected:
                raise ValueError(
                    f"the state `{name}` of parameter {index} must be of shape {expected}, but is of shape {shape}"
                )
            return saved[name].reshape(-1)[held.start : held.stop]

        self.load_shards(state_dict, read)

    @torch.no_grad()
    def load_shards(self, options: Mapping[str, Any], read: ReadShard) -> None:
        """Restores state shard by shard, without communication.

        Args:
            options: What `options` returned.
            read: Called with the number of a parameter, the name of a state and the range of the flattened whole state
                that this process holds; returns that range of it (on any device, copied here), or None if there is no
                such state.

        Raises:
            ValueError: If `options` are not of such an optimizer, its groups are not those of this one, or a state is
                missing or of another size; nothing is changed then.
        """
        groups = options["param_groups"]
        if lacking := [name for group in groups for name in _OPTIONS if name not in group]:
            raise ValueError(f"the state is not that of {type(self).__name__}: its groups lack `{lacking[0]}`")
        sizes = [len(group["params"]) for group in self.param_groups]
        if (found := [len(group["params"]) for group in groups]) != sizes:
            raise ValueError(f"the state must be of parameter groups of {sizes} parameters, but is of {found}")
        restored: dict[torch.Tensor, State] = {}
        for index, parameter in enumerate(self._parameters()):
            step = read(index, "step", range(1))
            if step is not None:
                restored[parameter] = self._restored(parameter, index, step, read)
        # PyTorch would convert all state, masters too, to each parameter's type: it gets the groups only.
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(restored)
        if "loss_scale" in options:
            self.scaler = LossScaler(**options["loss_scale"])

    def _restored(self, parameter: torch.nn.Parameter, index: int, step: torch.Tensor, read: ReadShard) -> State:
        held = current_engine().held_range(parameter)
        state = self._new_state(parameter)
        state["step"].copy_(step.view(()))
        for name, tensor in state.items():
            if name == "step" or not held:
                continue
            saved = read(index, name, held)
            if saved is None and name == "master":
                continue  # saved with float32 parameters: they are the masters, and may have been loaded
            if saved is None:
                raise ValueError(f"the state must have `{name}` of parameter {index}, whose other parts are there")
            if saved.numel() != len(held):
                found = f"must have {len(held)} elements here, but has {saved.numel()}"
                raise ValueError(f"the state `{name}` of parameter {index} {found}")
            tensor.copy_(saved.view(tensor.shape))
        return state

    def _parameters(self) -> list[torch.nn.Parameter]:
        """All parameters in the order in which an optimizer's state numbers them."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _steps_anywhere(self) -> list[float]:
        """The step that each parameter's state has reached on any process; -1 where none has state."""
        held = [self.state.get(parameter) for parameter in self._parameters()]
        steps = torch.tensor([float(state["step"]) if state else -1.0 for state in held])
        return current_engine().all_reduce(steps, "max").tolist()

    def _update_in_one_pass(self, group: dict[str, Any], scale: float) -> Bucket:
        """Updates the parameters of a group that one kernel takes; returns the others that have a gradient."""
        local = current_engine().local
        others: Bucket = []
        operands: list[tuple[torch.Tensor, ...]] = []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self._state_of(parameter)
            held, gradient = local(parameter.detach()), local_gradient(parameter)
            if "master" in state and gradient.dtype == held.dtype and fits_one_pass(held, gradient, *state.values()):
                operands.append(
                    (held, gradient, *(state[name] for name in ("master", "exp_avg", "exp_avg_sq", "step")))
                )
            else:
                others.append(parameter)
        if operands:
            from model_center.engine.optim import kernels  # where there is Triton

            options = {name: group[name] for name in ("betas", "eps", "weight_decay")}
            kernels.update(*zip(*operands, strict=True), lr=_rate(group), scale=scale, **options)
        return others

    def _state_of(self, parameter: torch.nn.Parameter) -> State:
        if not self.state[parameter]:
            self.state[parameter] = self._new_state(parameter)
        state: State = self.state[parameter]
        return state

    def _update_bucket(
        self, group: dict[str, Any], bucket: Bucket, gradients: list[torch.Tensor], scale: float
    ) -> None:
        states = [self._state_of(parameter) for parameter in bucket]
        local = current_engine().local
        targets = [state.get("master", local(parameter)) for state, parameter in zip(states, bucket, strict=True)]
        steps = [state["step"] for state in states]
        operands = [targets, gradients, *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))]
        *pieces, last = _pieces(operands)
        for piece in pieces:
            self._update_piece(group, piece, [step.clone() for step in steps], scale)
        self._update_piece(group, last, steps, scale)
        with_masters = [index for index, state in enumerate(states) if "master" in state]
        self._publish([bucket[index] for index in with_masters], [targets[index] for index in with_masters])

    def _update_piece(
        self, group: dict[str, Any], operands: Sequence[list[torch.Tensor]], steps: list[torch.Tensor], scale: float
    ) -> None:
        """Updates targets, given their gradients and moments; `steps` are counted up."""
        targets, gradients, exp_avgs, exp_avg_sqs = operands
        # What is divided is a copy, and it is the only one.
        converted = [
            gradient.to(target.dtype, copy=scale != 1) for gradient, target in zip(gradients, targets, strict=True)
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
            yield [local_gradient(parameter) for parameter in bucket]

    def _publish(self, parameters: Bucket, masters: list[torch.Tensor]) -> None:
        """Rounds updated masters to their parameters."""
        master_of = dict(zip(parameters, masters, strict=True))
        local = current_engine().local
        for same in group_by_kind(parameters):
            torch._foreach_copy_([local(parameter) for parameter in same], [master_of[parameter] for parameter in same])


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


def _rate(group: Mapping[str, Any]) -> float:
    """The learning rate of this step."""
    rate: float = group["lr"] if group["steps"] >= group["hold_steps"] else 0.0
    return rate


def _pieces(operands: Sequence[list[torch.Tensor]]) -> list[Sequence[list[torch.Tensor]]]:
    """Those of a bucket in one piece, but for a single parameter that is larger than buckets are: it comes in rows."""
    first = operands[0][0]
    if first.numel() <= BUCKET_ELEMENTS:
        return [operands]
    rows = max(1, BUCKET_ELEMENTS * len(first) // first.numel())
    return [[[part] for part in parts] for parts in zip(*(tensor.split(rows) for (tensor,) in operands), strict=True)]


def local_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this process holds of a parameter's gradient."""
    return current_engine().local(cast(torch.Tensor, parameter.grad))
