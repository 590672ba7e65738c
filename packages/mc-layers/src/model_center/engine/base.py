"""The engine seam: what layers, models and training code ask of whatever runs them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch

from model_center.engine.dtype import is_half
from model_center.engine.initializer import Initializer

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
ReduceOp = Literal["sum", "avg", "max", "min", "prod"]


class Engine(ABC):
    """Runs modules on one or many devices.

    The seam acts at construction: a layer asks the current engine which class to allocate (`module_class`) and for each
    parameter (`parameter`), a model passes its blocks through `checkpoint_block` and `block_list`. After that a module
    behaves as an ordinary `torch.nn.Module` for its caller. A second engine provides every abstract method below; the
    optimizers, schedules and losses of this package work on the parameters and gradients that a process holds, whole or
    sharded, and need nothing else from it.

    Attributes:
        name: Short name for messages and reports.
        device: Where this process keeps parameters and expects inputs.
        rank: Number of this process, from 0.
        world_size: Number of processes.
        use_checkpoint: Whether blocks recompute their activations in backward.
        compiles: Whether blocks are compiled.
        activation_budget: Share of the activations that compiled blocks keep for backward; None sets no limit.
        deterministic: Whether what runs under `use_engine` repeats bit by bit.
        gradient_divisor: What a loss is divided by so that the gradients of all processes average: 1 where the engine
            itself averages them, `world_size` where it sums them.
    """

    name: str
    device: torch.device
    rank: int = 0
    world_size: int = 1
    use_checkpoint: bool = False
    compiles: bool = False
    activation_budget: float | None = None
    deterministic: bool = False
    gradient_divisor: float = 1

    @property
    def half_dtype(self) -> torch.dtype:
        """What `HALF` stands for: float16 on CUDA, float32 elsewhere."""
        return torch.float16 if self.device.type == "cuda" else torch.float32

    def resolve_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The real data type that `dtype` asks for.

        Args:
            dtype: A floating-point data type, or `HALF` for the engine's half type.

        Raises:
            ValueError: If `dtype` is anything else.
        """
        if is_half(dtype):
            return self.half_dtype
        if not getattr(dtype, "is_floating_point", False):
            raise ValueError(f"`dtype` must be a floating-point torch.dtype such as torch.bfloat16, but is {dtype!r}")
        return dtype

    # Construction

    @abstractmethod
    def module_class(self, cls: type[ModuleT]) -> type[ModuleT]:
        """The class to allocate when a layer of class `cls` is constructed.

        Either `cls` itself or a cached subclass of the same name that mixes the engine's behaviour in. Asked with a
        class it has returned before (as copying a module does), it must return that class unchanged.
        """

    @abstractmethod
    def parameter(self, *shape: int, dtype: torch.dtype, init: Initializer) -> torch.nn.Parameter:
        """A new parameter on `device`.

        Args:
            *shape: Size of each dimension of the whole parameter.
            dtype: Its data type, or `HALF`.
            init: What fills it, unless `fills_parameters()` says that nothing does. The engine remembers it for
                `init_parameters`.
        """

    @abstractmethod
    def init_parameters(self, module: torch.nn.Module) -> None:
        """Fills all parameters of `module` that came from `parameter` again, as their initialisers say."""

    @abstractmethod
    def checkpoint_block(self, module: torch.nn.Module) -> torch.nn.Module:
        """Prepares one block of a model: the unit of recomputation, compilation and, with several processes, sharding.

        The result is called as `module` is, with positional arguments only; parameter names, attributes and buffers are
        reached through it as through `module`. A block that is already prepared comes back unchanged.
        """

    def block_list(self, blocks: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
        """Prepares blocks that run one after another, so that an engine may link them (to prefetch, for instance).

        `blocks` may make them one by one, so that an engine that shards never holds more than one whole.
        """
        return [self.checkpoint_block(block) for block in blocks]

    # Communication. With one process each of these is the identity.

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """`tensor` (any shape) reduced over all processes by `op`."""

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors (...) of all processes as (world_size, ...)."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """The tensor (any shape) of process `root`."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all processes are here and the work they have given to their devices is done."""

    # Training

    @abstractmethod
    def total_norm(self, gradients: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
        """Norm of the gradients of all processes, seen as one vector; float32 scalar, computed without overflow."""

    def adopt(self, parameters: Iterable[torch.Tensor]) -> None:  # noqa: B027 - most engines have nothing to do
        """Told of all parameters that are to be trained, also those that did not come from `parameter`."""

    @abstractmethod
    def before_update(self) -> None:
        """Called before gradients are read for clipping or for a step; an engine may have reductions to wait for."""

    def before_update_of(self, param_groups: Iterable[Mapping[str, Any]]) -> None:
        """`adopt` and `before_update`, for the parameters of an optimizer's groups."""
        for group in param_groups:
            self.adopt(group["params"])
        self.before_update()

    @abstractmethod
    def after_update(self) -> None:
        """Called after optimizers changed parameters; an engine may have to order later gathers behind that."""

    # Shards. An engine of whole tensors has nothing to do.

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """What this process holds of a parameter or gradient, as a plain tensor that shares its memory."""
        return tensor

    def held_range(self, parameter: torch.Tensor) -> range:
        """Which elements of the whole parameter this process holds, counted row by row; always without a gap."""
        return range(parameter.numel())

    def whole_shape(self, parameter: torch.Tensor) -> torch.Size:
        """The shape of the whole parameter."""
        return parameter.shape

    def replicated(self, parameter: torch.Tensor) -> bool:  # noqa: ARG002
        """Whether every process holds all of the parameter."""
        return True

    def part(self, parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """What this process holds of `whole`, which is sharded as `parameter` is (an optimizer's state, for one)."""
        held = self.held_range(parameter)
        return whole.reshape(-1)[held.start : held.stop].view(self.local(parameter).shape)

    def whole(self, parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """The parts of all processes together, the inverse of `part`. All processes must call it."""
        if self.replicated(parameter):
            return part.view(self.whole_shape(parameter))
        held = self.held_range(parameter)
        ranges = self.all_gather(torch.tensor([held.start, held.stop])).tolist()
        padded = part.new_zeros(max(stop - start for start, stop in ranges))
        padded[: len(held)] = part.flatten()
        whole = part.new_empty(self.whole_shape(parameter))
        for (start, stop), gathered in zip(ranges, self.all_gather(padded), strict=True):
            whole.view(-1)[start:stop] = gathered[: stop - start]
        return whole

    # Checkpoints

    @abstractmethod
    def state_shapes(self, module: torch.nn.Module) -> dict[str, torch.Size]:
        """Names and whole shapes of what `state_dict` returns, without gathering anything."""

    @abstractmethod
    def state_dict(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Whole parameters and buffers by plain name, on the CPU, complete on rank 0 (others may return less)."""

    @abstractmethod
    def load_state_dict(self, module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Copies whole tensors into the parameters and buffers of the same names, converting their data type.

        The names and shapes of `state` have been checked against `state_shapes`; absent names keep their values.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Ends communication. The engine is not used afterwards."""
