"""Plain PyTorch: one process on one device."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from model_center.engine.base import Engine, ModuleT, ReduceOp
from model_center.engine.compilation import check_settings
from model_center.engine.initializer import Initializer, fills_parameters
from model_center.engine.recompute import as_block
from model_center.engine.tensors import local_norm


class InitializedParameter(torch.nn.Parameter):
    """A parameter that remembers its initialiser, also when it is copied."""

    initializer: Initializer

    def __deepcopy__(self, memo: dict[int, Any]) -> "InitializedParameter":
        copied: InitializedParameter = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        copied.initializer = self.initializer
        return copied


class TorchEngine(Engine):
    """Plain PyTorch in one process, on the CPU or on one GPU.

    Every collective is the identity, so callers need no case for a single process.

    Args:
        device: Where to run; by default the CUDA device of number `LOCAL_RANK` (or 0) if there is CUDA, else the CPU.
        use_checkpoint: Whether blocks recompute their activations in backward; by default on CUDA only, and not with an
            `activation_budget`.
        compile: Whether blocks are compiled.
        activation_budget: Share of the activations that compiled blocks keep for backward, from 0 to 1.
        deterministic: Whether what runs under `use_engine` repeats bit by bit.

    Raises:
        ValueError: If `compile` is asked for where there is no compiler, or `activation_budget` is out of range or goes
            with no `compile` or with `use_checkpoint`.
    """

    name = "torch"

    def __init__(
        self,
        device: torch.device | None = None,
        use_checkpoint: bool | None = None,
        *,
        compile: bool = False,
        activation_budget: float | None = None,
        deterministic: bool = False,
    ) -> None:
        self.device = _default_device() if device is None else device
        recomputes = self.device.type == "cuda" and activation_budget is None
        self.use_checkpoint = recomputes if use_checkpoint is None else use_checkpoint
        self.compiles, self.activation_budget, self.deterministic = compile, activation_budget, deterministic
        check_settings(self.device, use_checkpoint=use_checkpoint, compile=compile, activation_budget=activation_budget)

    def module_class(self, cls: type[ModuleT]) -> type[ModuleT]:
        """`cls` itself."""
        return cls

    def parameter(self, *shape: int, dtype: torch.dtype, init: Initializer) -> torch.nn.Parameter:
        """A new parameter on `device`, filled at once from torch's global random generator (not in `uninitialized`)."""
        parameter = InitializedParameter(torch.empty(*shape, dtype=self.resolve_dtype(dtype), device=self.device))
        parameter.initializer = init
        if fills_parameters():
            init(parameter)
        return parameter

    def init_parameters(self, module: torch.nn.Module) -> None:
        """Fills all parameters of `module` that came from `parameter` again."""
        for parameter in module.parameters():
            # What pickle brings back has kept the attribute, but not the class.
            initializer: Initializer | None = getattr(parameter, "initializer", None)
            if initializer is not None:
                initializer(parameter)

    def checkpoint_block(self, module: torch.nn.Module) -> torch.nn.Module:
        """`module` itself, which from now on is compiled and recomputes its activations, if the settings say so."""
        return as_block(
            module,
            recompute=self.use_checkpoint,
            compiles=self.compiles,
            activation_budget=self.activation_budget,
        )

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:  # noqa: ARG002
        """`tensor` itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` (...) as (1, ...)."""
        return tensor.unsqueeze(0)

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:  # noqa: ARG002
        """`tensor` itself."""
        return tensor

    def synchronize(self) -> None:
        """Waits for the GPU, if this process has one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def total_norm(self, gradients: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
        """Norm of all gradients as one vector; a handful of kernels, no wait for the device."""
        return local_norm(gradients, norm_type, self.device)

    def before_update(self) -> None:
        """Nothing to wait for: backward runs on the same stream."""

    def after_update(self) -> None:
        """Nothing to order."""

    def state_shapes(self, module: torch.nn.Module) -> dict[str, torch.Size]:
        """Names and shapes of the parameters and persistent buffers."""
        return {name: tensor.shape for name, tensor in module.state_dict().items()}

    def state_dict(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers on the CPU (not copied where they are there already)."""
        return {name: tensor.cpu() for name, tensor in module.state_dict().items()}

    def load_state_dict(self, module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Copies `state` into parameters and buffers of the same names."""
        module.load_state_dict(state, strict=False)

    def shutdown(self) -> None:
        """Nothing to end: one process communicates with nobody."""


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
