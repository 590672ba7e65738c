"""What Adam keeps of each parameter from step to step, and how that is saved and restored."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from model_center.engine.current import current_engine
from model_center.engine.optim.loss_scale import LossScaler
from model_center.engine.optim.masters import joined, remainder_of
from model_center.engine.tensors import is_dense

# What `AdamOptimizer` sets of each parameter group; what PyTorch adds by itself is not ours to ask for.
_OPTIONS = ("lr", "betas", "eps", "weight_decay", "hold_steps", "steps")

State: TypeAlias = dict[str, torch.Tensor]
ReadTensor: TypeAlias = Callable[[], torch.Tensor]
ReadShard: TypeAlias = Callable[[int, str, range], torch.Tensor | None]


@dataclass(frozen=True)
class Shard:
    """What one process holds of one tensor of an optimizer's state.

    Attributes:
        index: Number of the parameter, as PyTorch counts in `state_dict`.
        name: "exp_avg", "exp_avg_sq", "master" or "step".
        start: Where it begins in the flattened whole.
        shape: Shape of the whole.
        size: Number of elements of it.
        read: Returns these elements, one-dimensional: those of training, or made for this.
    """

    index: int
    name: str
    start: int
    shape: tuple[int, ...]
    size: int
    read: ReadTensor


class AdamState(torch.optim.Optimizer):
    """The half of `AdamOptimizer` that holds moments and masters; the other half updates them.

    Attributes:
        scaler: The loss scale, which is saved and restored with them.
        tells_engine: It calls the engine before and after updates, which is else done for an optimizer.
    """

    scaler: LossScaler
    tells_engine = True

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "scaler": self.scaler}

    def state_dict(self) -> dict[str, Any]:
        """Moments, masters, options and loss scale: all that training needs to go on bit by bit.

        With several processes all must call it. It is complete on rank 0, holds whole tensors, and fits any number of
        processes; on the other ranks there are no tensors in it.
        """
        engine = current_engine()
        state: dict[int, State] = {}
        for index, (parameter, step) in enumerate(zip(self._parameters(), self._steps_anywhere(), strict=True)):
            if step < 0:
                continue
            # A process that holds nothing of a parameter has no state of it, but must help to gather it.
            held = self.state.get(parameter) or self._new_state(parameter)
            for name, read in self._saved_form(parameter, held):
                if name == "step":
                    continue
                whole = engine.whole(parameter, read())
                if engine.rank == 0:  # and what is made for this is not left on the GPU
                    made = name == "master" or engine.world_size > 1
                    state.setdefault(index, {})[name] = whole.cpu() if made else whole
            if engine.rank == 0:
                state[index]["step"] = torch.tensor(step)
        return {**self.options(), "state": state}

    def options(self) -> dict[str, Any]:
        """What `state_dict` returns, without the tensors: JSON can hold it, and it is the same on every process."""
        groups = super().state_dict()["param_groups"]
        return {"param_groups": groups, "loss_scale": self.scaler.state_dict()}

    def shards(self) -> Iterator[Shard]:
        """The state that this process holds, without communication; nothing is copied but masters as they are read."""
        engine = current_engine()
        for index, parameter in enumerate(self._parameters()):
            held = engine.held_range(parameter)
            state = self.state.get(parameter) if held else None
            for name, read in self._saved_form(parameter, state or {}):
                if name == "step":
                    yield Shard(index, name, 0, (), 1, partial(_flattened, read))
                else:
                    shape = tuple(engine.whole_shape(parameter))
                    yield Shard(index, name, held.start, shape, len(held), partial(_flattened, read))

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

        Bfloat16 parameters become what their masters are rounded to, which they are in the same checkpoint.

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
        rounded: list[tuple[torch.Tensor, torch.Tensor]] = []
        for index, parameter in enumerate(self._parameters()):
            step = read(index, "step", range(1))
            if step is not None:
                restored[parameter] = self._restored(parameter, index, step, read, rounded)
        # PyTorch would convert all state, masters too, to each parameter's type: it gets the groups only.
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(restored)
        for held, value in rounded:
            held.copy_(value)
        current_engine().after_update()
        if saved := options.get("loss_scale"):
            self.scaler = self.scaler.resumed(saved["scale"], saved["steps_since_change"], enabled=saved["enabled"])

    def _restored(
        self,
        parameter: torch.nn.Parameter,
        index: int,
        step: torch.Tensor,
        read: ReadShard,
        rounded: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> State:
        """The state of a parameter; the parameter and its value go to `rounded` where they are half the master."""
        held = current_engine().held_range(parameter)
        state = self._new_state(parameter)
        state["step"].copy_(step.view(()))
        for kept_as, tensor in state.items():
            if kept_as == "step" or not held:
                continue
            name = "master" if kept_as == "remainder" else kept_as
            saved = read(index, name, held)
            if saved is None and name == "master":
                continue  # saved with float32 parameters: they are the masters, and may have been loaded
            if saved is None:
                raise ValueError(f"the state must have `{name}` of parameter {index}, whose other parts are there")
            if saved.numel() != len(held):
                found = f"must have {len(held)} elements here, but has {saved.numel()}"
                raise ValueError(f"the state `{name}` of parameter {index} {found}")
            saved = saved.view(tensor.shape)
            if kept_as == "remainder":
                own = current_engine().local(parameter.detach())
                master = saved.to(own.device, torch.float32)
                rounded.append((own, master.bfloat16()))
                saved = remainder_of(rounded[-1][1], master)
            tensor.copy_(saved)
        return state

    def _parameters(self) -> list[torch.nn.Parameter]:
        """All parameters in the order in which an optimizer's state numbers them."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _steps_anywhere(self) -> list[float]:
        """The step that each parameter's state has reached on any process; -1 where none has state."""
        held = [self.state.get(parameter) for parameter in self._parameters()]
        steps = torch.tensor([float(state["step"]) if state else -1.0 for state in held])
        return current_engine().all_reduce(steps, "max").tolist()

    def _state_of(self, parameter: torch.nn.Parameter) -> State:
        state: State = self.state[parameter]
        if not state:
            state = self.state[parameter] = self._new_state(parameter)
        return state

    def _new_state(self, parameter: torch.nn.Parameter) -> State:
        """Moments of zero and, unless the parameter can be updated where and as it is, its master.

        A bfloat16 parameter's master is the parameter and a "remainder", if it is kept beside it.
        """
        device = self._state_device(parameter)
        held = current_engine().local(parameter.detach())
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        state = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(held, dtype=dtype, device=device),
            "exp_avg_sq": torch.zeros_like(held, dtype=dtype, device=device),
        }
        # PyTorch's fused AdamW goes over memory from end to end, and would change what lies between.
        has_gaps = not is_dense(held)
        if parameter.dtype is torch.bfloat16 and device == parameter.device and not has_gaps:
            state["remainder"] = torch.zeros_like(held, dtype=torch.int16)
        elif dtype != parameter.dtype or device != parameter.device or has_gaps:
            state["master"] = held.to(device, dtype, copy=True)
        return state

    def _saved_form(self, parameter: torch.nn.Parameter, state: State) -> Iterator[tuple[str, ReadTensor]]:
        """The names under which a state is saved, and what returns its tensors: masters are whole there."""
        for name, tensor in state.items():
            if name == "remainder":
                yield "master", partial(joined, current_engine().local(parameter.detach()), tensor)
            else:
                yield name, tensor.detach

    def _state_device(self, parameter: torch.nn.Parameter) -> torch.device:
        """Where the moments and the master of a parameter are kept and updated."""
        return parameter.device


def _flattened(read: ReadTensor) -> torch.Tensor:
    return read().flatten()
