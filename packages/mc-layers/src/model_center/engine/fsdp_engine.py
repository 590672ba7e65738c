"""PyTorch in several processes: blocks are sharded with FSDP2, everything else is whole on each process."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count, pairwise
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, share_comm_ctx
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from model_center.engine import collectives
from model_center.engine.base import ReduceOp
from model_center.engine.initializer import Initializer
from model_center.engine.launch import Place, device_of, join
from model_center.engine.tensors import group_by_kind, local_norm
from model_center.engine.torch_engine import InitializedParameter, TorchEngine

_ZERO_LEVELS = (2, 3)


class FSDPEngine(TorchEngine):
    """PyTorch in several processes, with NCCL on GPUs and gloo on CPUs.

    Parameters, gradients and optimizer states of blocks are sharded, each parameter along its first dimension, by
    FSDP2's `fully_shard`; a block is sharded as soon as it is made, so that no process holds more than one whole. What
    is outside of blocks (embeddings, final norms, heads, the user's own `torch.nn` layers) is whole on every process,
    and its gradients are averaged before an update, which makes tied weights and access from anywhere as simple as in
    one process. Every process must run the same blocks and layers in the same order.

    All processes draw the same random numbers, so that fresh weights are those of a single process.

    Args:
        place: This process's place among the others.
        use_checkpoint: Whether blocks recompute their activations in backward; by default on CUDA only, and not with an
            `activation_budget`.
        zero_level: 3 shards a block's parameters between its uses, 2 keeps them from its forward to its backward pass,
            which saves one gathering for more memory.
        compile: Whether blocks are compiled.
        activation_budget: Share of the activations that compiled blocks keep for backward, from 0 to 1.
        deterministic: Whether what runs under `use_engine` repeats bit by bit.

    Raises:
        ValueError: If `zero_level` is neither 2 nor 3, the processes do not find each other, `compile` is asked for
            where there is no compiler, or `activation_budget` is out of range or goes with no `compile` or with
            `use_checkpoint`.
    """

    def __init__(
        self,
        place: Place,
        use_checkpoint: bool | None = None,
        zero_level: int = 3,
        *,
        compile: bool = False,
        activation_budget: float | None = None,
        deterministic: bool = False,
    ) -> None:
        if zero_level not in _ZERO_LEVELS:
            raise ValueError(f"`zero_level` must be 2 or 3, but is {zero_level}")
        super().__init__(
            device_of(place),
            use_checkpoint,
            compile=compile,
            activation_budget=activation_budget,
            deterministic=deterministic,
        )
        join(place, self.device)
        self.rank, self.world_size, self.zero_level = place.rank, place.world_size, zero_level
        self._mesh = init_device_mesh(self.device.type, (self.world_size,))
        self._replicated = WeakIdKeyDictionary()
        self._numbers = count()
        self._to_average: dict[int, torch.Tensor] = {}
        self._blocks: WeakSet[torch.nn.Module] = WeakSet()

    # Construction

    def init_parameters(self, module: torch.nn.Module) -> None:
        """Fills all parameters of `module` that came from `parameter` again, with the values of a single process."""
        self._reshard_blocks()
        for parameter in module.parameters():
            initializer: Initializer | None = getattr(parameter, "initializer", None)
            if initializer is None:
                continue
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            initializer(whole)
            with torch.no_grad():
                self.local(parameter).copy_(self.part(parameter, whole))

    def checkpoint_block(self, module: torch.nn.Module) -> torch.nn.Module:
        """`module` itself, whose parameters are from now on sharded; it gathers them for its forward and backward."""
        module = super().checkpoint_block(module)
        if isinstance(module, FSDPModule):
            return module
        initializers = {
            name: parameter.initializer
            for name, parameter in module.named_parameters()
            if isinstance(parameter, InitializedParameter)
        }
        fully_shard(module, mesh=self._mesh, reshard_after_forward=self.zero_level == 3)
        self._blocks.add(module)
        for name, parameter in module.named_parameters():
            if name in initializers:
                parameter.initializer = initializers[name]  # type: ignore[attr-defined]
        if self.zero_level == 2:
            # Otherwise what an evaluation gathered would stay, as no backward pass lets go of it.
            module.register_forward_hook(_reshard_without_gradients)
        return module

    def block_list(self, blocks: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
        """Sharded blocks, of which each gathers the next one's parameters while it computes."""
        prepared = super().block_list(blocks)
        sharded: list[FSDPModule] = [block for block in prepared if isinstance(block, FSDPModule)]
        for block in sharded:
            # Each block is a root, whose set-up otherwise comes with its first forward and would undo the next line.
            block._get_fsdp_state()._lazy_init()
        share_comm_ctx(sharded)
        for block, following in pairwise(sharded):
            block.set_modules_to_forward_prefetch([following])
        return prepared

    # Communication

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """`tensor` (any shape, on any device) reduced over all processes by `op`."""
        return collectives.all_reduce(tensor, op, self.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors (...) of all processes as (world_size, ...)."""
        return collectives.all_gather(tensor, self.device)

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """The tensor (any shape) of process `root`."""
        return collectives.broadcast(tensor, root, self.device)

    def synchronize(self) -> None:
        """Waits for this process's GPU and for all processes."""
        super().synchronize()
        dist.barrier()

    # Training

    def adopt(self, parameters: Iterable[torch.Tensor]) -> None:
        """Takes over parameters that are whole here: all processes get rank 0's values, and average gradients."""
        for parameter in parameters:
            if isinstance(parameter, DTensor) or not parameter.requires_grad or parameter in self._replicated:
                continue
            number = next(self._numbers)
            self._replicated[parameter] = number
            dist.broadcast(parameter.detach(), 0)

            def collect(changed: torch.Tensor, number: int = number) -> None:
                self._to_average[number] = changed

            parameter.register_post_accumulate_grad_hook(collect)
            if parameter.grad is not None:
                collect(parameter)

    def before_update(self) -> None:
        """Averages the gradients of parameters that are whole on each process; FSDP2 has averaged the others."""
        # In the order of adoption, which is the same everywhere.
        waiting = [self._to_average[number].grad for number in sorted(self._to_average)]
        self._to_average.clear()
        for gradients in group_by_kind([gradient for gradient in waiting if gradient is not None]):
            flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(self.world_size)
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(
                gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
            )

    def after_update(self) -> None:
        """Lets go of parameters from before the update: those gathered ahead for a block that did not run, for one."""
        self._reshard_blocks()

    def _reshard_blocks(self) -> None:
        for block in self._blocks:
            sharded = cast(FSDPModule, block)
            group = sharded._get_fsdp_state()._fsdp_param_group
            if group is None or (group.is_sharded and group._all_gather_result is None):
                continue
            sharded.unshard()  # waits for what is on its way, without which nothing is let go
            sharded.set_reshard_after_forward(True, recurse=False)  # or it stays for a backward pass to come
            sharded.reshard()
            sharded.set_reshard_after_forward(self.zero_level == 3, recurse=False)

    def total_norm(self, gradients: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
        """Norm of the gradients of all shards, and of those that are whole, as one vector."""
        shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        of_shards = self.all_gather(local_norm(shards, norm_type, self.device))
        of_whole = local_norm(whole, norm_type, self.device).to(of_shards.device)
        norms = torch.cat([of_shards, of_whole.unsqueeze(0)])
        return cast(torch.Tensor, torch.linalg.vector_norm(norms, norm_type))

    # Shards

    def local(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a parameter or gradient that this process holds, sharing its memory."""
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def held_range(self, parameter: torch.Tensor) -> range:
        """All elements, or those of the rows that are this process's shard."""
        if not isinstance(parameter, DTensor):
            return super().held_range(parameter)
        rows = len(parameter)
        size = parameter.numel() // max(rows, 1)
        each = -(-rows // self.world_size)
        return range(min(self.rank * each, rows) * size, min((self.rank + 1) * each, rows) * size)

    def replicated(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter is outside of blocks."""
        return not isinstance(parameter, DTensor)

    # Checkpoints

    def state_dict(self, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Whole parameters and persistent buffers on the CPU of rank 0; empty on other ranks."""
        state = {}
        for name, tensor in module.state_dict().items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.rank == 0:
                state[name] = whole.cpu()
        return state

    def load_state_dict(self, module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Copies this process's rows of `state` into parameters and buffers of the same names."""
        self._reshard_blocks()
        held = module.state_dict()
        sharded = {name: target for name, target in held.items() if isinstance(target, DTensor)}
        with torch.no_grad():
            # One by one, and of a mapped file no more than these rows are read.
            for name in sharded.keys() & state.keys():
                self.local(sharded[name]).copy_(self.part(sharded[name], state[name]))
        super().load_state_dict(module, {name: whole for name, whole in state.items() if name not in sharded})

    def shutdown(self) -> None:
        """Ends communication."""
        dist.destroy_process_group()


def _reshard_without_gradients(module: torch.nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001
    if not torch.is_grad_enabled() and isinstance(module, FSDPModule):
        module.reshard()
