"""BMTrain: parameters, gradients and optimizer states sharded over GPUs (ZeRO).

The only module that imports bmtrain.
"""

import contextlib
import os
import socket
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import bmtrain
import torch
from bmtrain import zero_context
from bmtrain.block_layer import Block
from bmtrain.global_var import config as bmtrain_config

from model_center.engine.base import Engine, ModuleT, ReduceOp
from model_center.engine.compilation import check_settings
from model_center.engine.initializer import Initializer, fills_parameters
from model_center.engine.launch import report_failures
from model_center.engine.recompute import as_block
from model_center.engine.run_ahead import RunAhead
from model_center.engine.tensors import local_norm

_ZERO_LEVELS = (2, 3)


class BMTrainEngine(Engine):
    """BMTrain on CUDA, from one GPU to many hosts: one process for each GPU, launched with torchrun.

    Gradients are summed over processes, so that losses must be divided by `gradient_divisor`; the optimizers and
    managers of this package do that.

    Args:
        seed: Seeds the random generators, if BMTrain has not been initialised yet.
        use_checkpoint: Whether blocks recompute their activations in backward; by default they do, unless there is an
            `activation_budget`.
        zero_level: 3 shards a block's parameters between its uses, 2 keeps them from its forward to its backward pass,
            which saves one gathering for more memory. Blocks that do not recompute keep them in any case, in what
            backward needs.
        compile: Whether blocks are compiled.
        activation_budget: Share of the activations that compiled blocks keep for backward, from 0 to 1.
        deterministic: Whether what runs under `use_engine` repeats bit by bit.

    Raises:
        ValueError: If there is no CUDA device, `zero_level` is neither 2 nor 3, `compile` is asked for where there is
            no compiler, or `activation_budget` is out of range or goes with no `compile` or with `use_checkpoint`.
    """

    name = "bmtrain"

    def __init__(
        self,
        seed: int = 0,
        use_checkpoint: bool | None = None,
        zero_level: int = 3,
        *,
        compile: bool = False,
        activation_budget: float | None = None,
        deterministic: bool = False,
    ) -> None:
        if zero_level not in _ZERO_LEVELS:
            raise ValueError(f"`zero_level` must be 2 or 3, but is {zero_level}")
        if not torch.cuda.is_available():
            raise ValueError("BMTrain needs a CUDA device, but there is none; use the torch engine on this machine")
        if not bmtrain_config["initialized"]:
            _initialise(seed)
        self.rank = bmtrain.rank()
        self.world_size = bmtrain.world_size()
        self.gradient_divisor = self.world_size
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.use_checkpoint = activation_budget is None if use_checkpoint is None else use_checkpoint
        self.zero_level = zero_level
        self.compiles, self.activation_budget, self.deterministic = compile, activation_budget, deterministic
        check_settings(self.device, use_checkpoint=use_checkpoint, compile=compile, activation_budget=activation_budget)

        # BMTrain lets the host wait, at every block, for the one before. Nothing else depends on that: its streams wait
        # for each other wherever one needs what another has written.
        self._ahead = RunAhead()
        zero_context.wait_loader = self._ahead.enter
        zero_context.torch = _EmptyTensorsOnTheGPU()

    def module_class(self, cls: type[ModuleT]) -> type[ModuleT]:
        """A subclass of `cls` whose parameters are gathered when they are read outside a block."""
        if issubclass(cls, _ShardedModule):
            return cls
        if cls not in _sharded_classes:
            names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
            _sharded_classes[cls] = type(cls.__name__, (cls, _ShardedModule), names)
        return cast(type[ModuleT], _sharded_classes[cls])

    def parameter(self, *shape: int, dtype: torch.dtype, init: Initializer) -> torch.nn.Parameter:
        """This process's shard of a new parameter, filled so that the whole is the same for any number of processes."""
        whole = torch.empty(*shape, dtype=self.resolve_dtype(dtype), device=self.device)
        if fills_parameters():
            init(whole)
        parameter: torch.nn.Parameter = bmtrain.DistributedParameter(whole, init_method=init)
        return parameter

    def init_parameters(self, module: torch.nn.Module) -> None:
        """Fills all parameters of `module` that came from `parameter` again."""
        bmtrain.init_parameters(module)
        self.after_update()

    def checkpoint_block(self, module: torch.nn.Module) -> "_TransparentBlock":
        """A BMTrain block around `module`, which gathers all its parameters at once."""
        if isinstance(module, _TransparentBlock):
            return module
        if any(getattr(part, "int8", False) for part in module.modules()):
            raise ValueError(
                "`int8` must be False under BMTrain, whose blocks have no 8-bit weights; use the torch engine"
            )
        if self.compiles:  # inside BMTrain's block, which recomputes by itself
            module = as_block(module, recompute=False, compiles=True, activation_budget=self.activation_budget)
        block = _TransparentBlock(module, use_checkpoint=self.use_checkpoint, zero_level=self.zero_level)
        self._ahead.expect(sum(shard.nbytes for shard in block._storage_params.values()) * self.world_size)
        return block

    def block_list(self, blocks: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
        """Blocks that know their neighbours, so that one's gradients are scattered while the next are computed."""
        prepared = [self.checkpoint_block(block) for block in blocks]
        for previous, block in zip([None, *prepared], prepared, strict=False):
            block.set_pre_module(previous)
            block._is_first_layer = previous is None
            block._is_last_layer = block is prepared[-1]
        return list(prepared)

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """`tensor` (any shape, on any device) reduced over all processes by `op`."""
        reduced: torch.Tensor = bmtrain.distributed.all_reduce(tensor.to(self.device), op)
        return reduced.to(tensor.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors (...) of all processes as (world_size, ...)."""
        gathered: torch.Tensor
        if tensor.dtype == torch.bool:  # which NCCL does not know
            gathered = self.all_gather(tensor.to(torch.uint8)).bool()
        else:
            gathered = bmtrain.distributed.all_gather(tensor.to(self.device))
        return gathered.to(tensor.device)

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """The tensor (any shape) of process `root`."""
        # BMTrain sends whole storages, which a view would share with other tensors.
        sent: torch.Tensor = bmtrain.distributed.broadcast(tensor.to(self.device).contiguous().clone(), root)
        return sent.to(tensor.device)

    def synchronize(self) -> None:
        """Waits for the GPU and for all processes."""
        torch.cuda.synchronize()
        bmtrain.synchronize()

    def total_norm(self, gradients: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
        """Norm of the shards of all processes as one vector."""
        norm = local_norm(gradients, norm_type, self.device)
        if norm_type == float("inf"):
            return self.all_reduce(norm, "max")
        # Powers of a norm may leave the range of float32 where the norm itself does not.
        total = self.all_reduce(norm.double().pow(norm_type), "sum")
        return total.pow(1 / norm_type).float()

    def before_update(self) -> None:
        """Lets the current stream wait for gradients that are being scattered."""
        torch.cuda.current_stream().wait_stream(bmtrain_config["load_stream"])

    def after_update(self) -> None:
        """Lets the next gathering wait for parameters that are being changed."""
        bmtrain_config["load_stream"].wait_stream(torch.cuda.current_stream())

    def held_range(self, parameter: torch.Tensor) -> range:
        """This process's partition: of the parameter, or of its block, which may hold none of the parameter."""
        if not isinstance(parameter, bmtrain.DistributedParameter):
            return super().held_range(parameter)
        start, stop = parameter._start_partition, parameter._end_partition
        # Where there is nothing, BMTrain has no start, or one behind the end.
        return range(0) if start is None or start >= stop else range(start, stop)

    def whole_shape(self, parameter: torch.Tensor) -> torch.Size:
        """The shape before partitioning; what a process holds is a vector."""
        shape: torch.Size = getattr(parameter, "_original_shape", parameter.shape)
        return shape

    def replicated(self, parameter: torch.Tensor) -> bool:
        """Whether there is one process only, or the parameter is not BMTrain's."""
        return self.world_size == 1 or not isinstance(parameter, bmtrain.DistributedParameter)

    def state_shapes(self, module: torch.nn.Module) -> dict[str, torch.Size]:
        """Names and whole shapes of parameters and persistent buffers."""
        shapes = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not isinstance(parameter, bmtrain.DistributedParameter):
                raise ValueError(
                    f"the parameter `{name}` is a plain torch.nn.Parameter, which BMTrain neither shards nor averages; "
                    "use the layers of `model_center.layer`, or `Module.parameter` in your own"
                )
            shapes[name] = parameter._original_shape
        return shapes

    def state_dict(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Whole parameters by plain name, on the CPU of rank 0; empty on other ranks."""
        self.synchronize()
        state: dict[str, torch.Tensor] = {}
        self._collect(module, "", state)
        return state

    def _collect(self, module: torch.nn.Module, prefix: str, state: dict[str, torch.Tensor]) -> None:
        """Gathers module by module, so that ranks other than 0 never hold more than one module whole."""
        destination = state if self.rank == 0 else {}
        if isinstance(module, Block):
            module.state_dict(destination=destination, prefix=prefix)
            return
        module._save_to_state_dict(destination, prefix, False)
        for name, child in module.named_children():
            self._collect(child, f"{prefix}{name}.", state)

    def load_state_dict(self, module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Copies this process's shards of `state`; of a mapped file no more than these are read."""
        with torch.no_grad():
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if name in state:
                    parameter.copy_(self.part(parameter, state[name]))
        self.after_update()

    def shutdown(self) -> None:
        """Ends communication."""
        self.synchronize()
        bmtrain.nccl.commDestroy(bmtrain_config["comm"])
        bmtrain_config["initialized"] = False


class _EmptyTensorsOnTheGPU:
    """PyTorch, for BMTrain's gathering, which makes an empty tensor for every parameter at every block.

    It copies each from the host, which takes the host longer than all else that it does for a block.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(data: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What `torch.tensor` returns for no data."""
        return (
            torch.empty(0, dtype=dtype, device=device) if not data else torch.tensor(data, dtype=dtype, device=device)
        )


class _ShardedModule(bmtrain.DistributedModule):  # type: ignore[misc]
    """Mixed into the class of a layer: parameters outside blocks are gathered when they are read."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, torch.Tensor) and value.grad_fn is not None:
            return _OwnGradient.apply(value)  # type: ignore[no-untyped-call]
        return value


_sharded_classes: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


class _OwnGradient(torch.autograd.Function):
    """Gives BMTrain's reduction a gradient with a storage of its own: it sends storages and ignores offsets."""

    @staticmethod
    def forward(ctx: Any, gathered: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - autograd's signature
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - autograd's signature
        (gradient,) = gradients
        whole = gradient.is_contiguous() and gradient.untyped_storage().nbytes() == gradient.nbytes
        return gradient if whole else gradient.contiguous().clone()


class _TransparentBlock(Block):  # type: ignore[misc]
    """A BMTrain block that behaves as a module does."""

    def forward(self, *args: Any) -> Any:
        """Runs the inner module on positional arguments."""
        self._forget_cleared_gradients()
        outputs = super().forward(*args)
        for output in (outputs,) if isinstance(outputs, torch.Tensor) else outputs:
            if isinstance(output, torch.Tensor) and output.requires_grad:
                # Runs before BMTrain's own backward: gradients may have been cleared after this forward pass.
                output.register_hook(lambda _: self._forget_cleared_gradients())
        return outputs

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Gathers whole parameters, which gives parameters the gradient of their block again."""
        self._forget_cleared_gradients()
        return super().state_dict(*args, **kwargs)

    def _forget_cleared_gradients(self) -> None:
        """Drops the block's own gradient once `zero_grad` has set those of its parameters to None.

        BMTrain adds new gradients to what its buffer holds, which `zero_grad(set_to_none=True)` does not reach.
        """
        for kind, buffer in self._storage_params.items():
            if buffer.grad is None:
                continue
            shards = [info["parameter"] for info in self._param_info if info["kw_name"] == kind and "begin" in info]
            if all(shard.grad is None for shard in shards):
                buffer.grad = None

    def train(self, mode: bool = True) -> "_TransparentBlock":
        """Sets the mode of the inner module."""
        self._module.train(mode)
        return self

    def eval(self) -> "_TransparentBlock":
        """Sets evaluation mode."""
        return self.train(False)


def _initialise(seed: int) -> None:
    """Starts BMTrain, and undoes what it does to the rest of the process."""
    if os.environ.get("WORLD_SIZE", "1") == "1" and "MASTER_PORT" not in os.environ:
        # Its default port is the same for every run of one process on a host.
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    # It warns, at every collective, about storages that PyTorch will hide one day.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"bmtrain\.")
    with _kept_process_settings():
        bmtrain.init_distributed(seed=seed)
    report_failures()


@contextlib.contextmanager
def _kept_process_settings() -> Iterator[None]:
    """BMTrain switches off cuDNN, which has the fastest attention, pins the CPUs that data loaders inherit, prints."""
    cudnn = torch.backends.cudnn.enabled
    affinity = os.sched_getaffinity(0)
    printing = bmtrain.init.print_dict
    bmtrain.init.print_dict = lambda *_: None
    try:
        yield
    finally:
        bmtrain.init.print_dict = printing
        torch.backends.cudnn.enabled = cudnn
        os.sched_setaffinity(0, affinity)
