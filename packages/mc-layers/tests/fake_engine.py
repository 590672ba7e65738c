"""A second engine for tests: two equal processes in one, with sharding's visible effects and BMTrain's restrictions.

Parameters are stored flat and take their shape when a layer reads them, blocks are wrappers that pass on positional
arguments only and recompute with reentrant checkpoints, and gradients are summed over the two processes.
"""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from model_center.engine import Engine, Initializer, TorchEngine, fills_parameters
from model_center.engine.base import ModuleT, ReduceOp


class FlatParameter(torch.nn.Parameter):
    whole_shape: tuple[int, ...]
    initializer: Initializer

    def whole(self) -> torch.Tensor:
        return self.view(self.whole_shape)


class FakeDistributedModule(torch.nn.Module):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value.whole() if isinstance(value, FlatParameter) else value

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in {**self._parameters, **self._buffers}.items():
            if tensor is not None and name not in self._non_persistent_buffers_set:
                destination[prefix + name] = (tensor.whole() if isinstance(tensor, FlatParameter) else tensor).detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, tensor in {**self._parameters, **self._buffers}.items():
            if tensor is not None and prefix + name in state_dict:
                with torch.no_grad():
                    tensor.copy_(state_dict[prefix + name].view(tensor.shape))


class FakeBlock(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, use_checkpoint: bool) -> None:
        super().__init__()
        self.__dict__["inner"] = module
        self.__dict__["use_checkpoint"] = use_checkpoint
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args = inspect.signature(self.inner.forward).bind(*args, **kwargs).args
        if self.use_checkpoint and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            return checkpoint(self.inner, *args, use_reentrant=True)
        return self.inner(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.inner._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.inner._load_from_state_dict(*args)

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        self.inner.train(mode)


class FakeEngine(Engine):
    """Rank 0 of two processes that hold the same data.

    Attributes:
        parameters: All parameters that layers asked for, in order.
        events: What was asked of the engine while training.
    """

    name = "fake"
    world_size = 2
    gradient_divisor = 2

    def __init__(self, use_checkpoint: bool = True) -> None:
        self.device = torch.device("cpu")
        self.use_checkpoint = use_checkpoint
        self.parameters: list[FlatParameter] = []
        self.events: list[str] = []
        self._classes: dict[type[torch.nn.Module], Any] = {}
        self._torch = TorchEngine(self.device)

    def module_class(self, cls: type[ModuleT]) -> type[ModuleT]:
        if issubclass(cls, FakeDistributedModule):
            return cls
        if cls not in self._classes:
            self._classes[cls] = type(cls.__name__, (cls, FakeDistributedModule), {})
        found: type[ModuleT] = self._classes[cls]
        return found

    def parameter(self, *shape: int, dtype: torch.dtype, init: Initializer) -> torch.nn.Parameter:
        whole = torch.empty(*shape, dtype=self.resolve_dtype(dtype))
        if fills_parameters():
            init(whole)
        parameter = FlatParameter(whole.flatten())
        parameter.whole_shape, parameter.initializer = shape, init
        parameter.register_hook(lambda gradient: gradient * self.world_size)  # type: ignore[no-untyped-call]
        self.parameters.append(parameter)
        return parameter

    def init_parameters(self, module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            if isinstance(parameter, FlatParameter):
                parameter.initializer(parameter.detach().view(parameter.whole_shape))

    def checkpoint_block(self, module: torch.nn.Module) -> torch.nn.Module:
        return module if isinstance(module, FakeBlock) else FakeBlock(module, self.use_checkpoint)

    def block_list(self, blocks: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
        prepared = super().block_list(blocks)
        self.events.append(f"link {len(prepared)} blocks")
        return prepared

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        return {"sum": tensor * 2, "prod": tensor * tensor}.get(op, tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, tensor])

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        return tensor.clone()

    def synchronize(self) -> None:
        self.events.append("synchronize")

    def total_norm(self, gradients: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
        return self._torch.total_norm(gradients, norm_type)

    def before_update(self) -> None:
        self.events.append("before update")

    def after_update(self) -> None:
        self.events.append("after update")

    def whole_shape(self, parameter: torch.Tensor) -> torch.Size:
        return torch.Size(getattr(parameter, "whole_shape", parameter.shape))

    def state_shapes(self, module: torch.nn.Module) -> dict[str, torch.Size]:
        return self._torch.state_shapes(module)

    def state_dict(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return self._torch.state_dict(module)

    def load_state_dict(self, module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        module.load_state_dict(state, strict=False)

    def shutdown(self) -> None:
        self.events.append("shutdown")
