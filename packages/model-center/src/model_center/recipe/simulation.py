"""A training step without numbers: the real model on PyTorch's meta device, and the memory that a GPU would need.

Every tensor that forward and backward make is counted from when it is made until it is let go of, so what blocks keep
for backward, what is computed again, and what exists for a moment only are as in the code, not as in a formula.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from model_center.engine import TorchEngine, use_engine
from model_center.layer.kernels.requirements import meta_stands_for_gpu
from model_center.model import BaseModel
from model_center.model.config import Config
from model_center.model.seq2seq import Seq2Seq
from model_center.model.stack_model import StackModel

META = torch.device("meta")
ALLOCATION = 512
"""PyTorch hands out GPU memory in multiples of this many bytes."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Size of what one process computes at once, without padding."""

    rows: int
    length: int
    """Tokens in a row; of the encoder in an encoder-decoder."""
    decoder_length: int = 0
    """Tokens in a row of an encoder-decoder's decoder."""
    targets: float = 1.0
    """Share of the tokens (of the decoder's, if there is one) that are to be predicted."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What a micro-batch needs beyond what was there before it, in bytes."""

    kept: int
    """What forward keeps for backward."""
    forward: int
    """Most at a time in forward."""
    loss: int
    """Most at a time in the head and its loss, what forward keeps included."""
    backward: int
    """Most at a time in backward, the gradients that are there by then included."""
    gradients: int
    """Gradients of all parameters."""


def meta_model(model_class: type[BaseModel], config: Config, *, recomputes: bool = False) -> BaseModel:
    """Make a model whose parameters have shapes and types only.

    Args:
        model_class: the family.
        config: its configuration, whose `dtype` is a real type.
        recomputes: whether blocks compute their activations again in backward.
    """
    with use_engine(TorchEngine(META, use_checkpoint=recomputes)):
        return model_class(config)


def simulate(model: BaseModel, batch: MicroBatch, *, shards: int = 1, accumulates: bool = False) -> StepMemory:
    """Run forward and backward of one micro-batch without numbers.

    Args:
        model: as `meta_model` returns it.
        batch: size of the micro-batch.
        shards: processes among which the gradients of blocks are divided as soon as they are there.
        accumulates: whether there are gradients of an earlier micro-batch, which these are added to.
    """
    model.train()
    meter = MemoryMeter(known=model.parameters())
    engine = TorchEngine(META)
    gradients = _Gradients(model, shards, exist=accumulates)
    with meta_stands_for_gpu(), use_engine(engine), gradients, meter, _AsOnGPU():
        return _step(model, batch, meter, gradients)


def _step(model: BaseModel, batch: MicroBatch, meter: "MemoryMeter", gradients: "_Gradients") -> StepMemory:
    before = meter.peak = meter.now
    output = _forward(model, batch)
    kept, forward = meter.now, meter.peak
    loss = model.summed_loss(output, _labels(batch))
    del output
    of_loss, meter.peak = meter.peak, meter.now
    loss.backward()
    return StepMemory(
        kept=kept - before,
        forward=forward - before,
        loss=of_loss - before,
        backward=meter.peak - before,
        gradients=gradients.size,
    )


def _forward(model: BaseModel, batch: MicroBatch) -> Tensor:
    """Return the last hidden state; through the skeleton, since families name their arguments differently."""
    ids = torch.empty(batch.rows, batch.length, dtype=torch.long, device=META)
    if isinstance(model, Seq2Seq):
        decoder_ids = torch.empty(batch.rows, batch.decoder_length, dtype=torch.long, device=META)
        outputs: Any = Seq2Seq.forward(model, input_ids=ids, decoder_input_ids=decoder_ids)
    else:
        assert isinstance(model, StackModel)
        outputs = StackModel.forward(model, input_ids=ids)
    hidden_states: Tensor = outputs.last_hidden_state
    return hidden_states


def _labels(batch: MicroBatch) -> Tensor:
    """Return labels on the CPU, where the loss looks for those that count."""
    labels = torch.full((batch.rows, batch.decoder_length or batch.length), -100)
    labels.view(-1)[: round(labels.numel() * batch.targets)] = 0
    return labels


def allocated(size: int) -> int:
    """Return what a tensor of so many bytes takes of a GPU's memory."""
    return -(-size // ALLOCATION) * ALLOCATION


class MemoryMeter(TorchDispatchMode):
    """Adds up the storages of all tensors on the meta device that operations make, until they are let go of.

    Args:
        known: tensors that are there already and not counted, though operations return views of them.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary({tensor.untyped_storage(): 0 for tensor in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and take note of what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device == META:
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = allocated(storage.nbytes())
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.now -= size


class _AsOnGPU(TorchFunctionMode):
    """Takes the kernels that a GPU has where the meta device would write operations out."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is F.rms_norm:
            return _RMSNorm.apply(args[0], kwargs["weight"])  # type: ignore[no-untyped-call]
        if func is torch.Tensor.is_cuda.__get__ and args[0].device == META:  # type: ignore[attr-defined]
            return True
        if func is torch.Tensor.backward:
            # What backward computes again must come by here, which PyTorch switches off while we are called.
            with self:
                return _run_backward(args[0])
        return func(*args, **kwargs)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, **_: bool) -> Tensor:
    """With a mask of booleans, as on a GPU."""
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: bool,
) -> Tensor:
    """By a kernel that never holds all scores."""
    assert attn_mask is None, "a micro-batch without padding has no mask"
    kernel = torch.ops.aten._scaled_dot_product_flash_attention
    output: Tensor = kernel(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return output


class _RMSNorm(torch.autograd.Function):
    """By a kernel that keeps its input, and a deviation of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _run_backward(loss: Tensor) -> None:
    """`loss.backward()`, without looking for modes that want to be asked."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _Gradients:
    """Keeps of each gradient of a block what one of several processes keeps, as soon as it is there."""

    def __init__(self, model: BaseModel, shards: int, *, exist: bool) -> None:
        self.parameters = list(model.parameters())
        in_blocks = {parameter for block in blocks_of(model) for parameter in block.parameters()}
        self.shards: dict[Tensor, int] = {
            parameter: shards if parameter in in_blocks else 1 for parameter in self.parameters
        }
        self.kept: dict[Tensor, Tensor] = {each: self._own(each) for each in self.parameters} if exist else {}

    @property
    def size(self) -> int:
        """Bytes of all gradients."""
        return sum(allocated(gradient.nbytes) for gradient in self.kept.values())

    def __enter__(self) -> None:
        self.hooks = [parameter.register_post_accumulate_grad_hook(self._keep) for parameter in self.parameters]

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.kept.clear()

    def _keep(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if parameter not in self.kept:
            self.kept[parameter] = gradient if self.shards[parameter] == 1 else self._own(parameter)

    def _own(self, parameter: Tensor) -> Tensor:
        return torch.empty(-(-parameter.numel() // self.shards[parameter]), dtype=parameter.dtype, device=META)


def blocks_of(model: BaseModel) -> list[torch.nn.Module]:
    """Return the blocks of all stacks, in order."""
    stacks = [stack for name in model.config.depths if (stack := getattr(model, name)) is not None]
    return [block for stack in stacks for block in stack.layers]
