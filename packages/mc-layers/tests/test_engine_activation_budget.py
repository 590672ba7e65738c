"""Compiled blocks under a budget of activations: what they keep, what they compute again, and what that gives."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model_center import engine as bmt
from model_center.engine import TorchEngine, compilation, recompute, use_engine
from model_center.engine.compilation import compiled_forward
from model_center.layer import AttentionMask, Encoder

CPU, META = torch.device("cpu"), torch.device("meta")
LENGTH, HEADS, DIM = 64, 2, 8


@pytest.fixture(autouse=True)
def graphs_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Divides graphs as the compiler does, but makes no machine code of them."""
    partitions = torch._dynamo.lookup_backend("aot_eager_decomp_partition")
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda _: partitions)
    monkeypatch.setattr(compilation, "_check_compiler", lambda _: None)
    recompute._block_class.cache_clear()
    yield
    torch._dynamo.reset()
    recompute._block_class.cache_clear()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compile": True, "activation_budget": 1.5}, "`activation_budget` must be from 0 to 1, but is 1.5"),
        ({"activation_budget": 0.5}, "`activation_budget` must be None without `compile`, but is 0.5"),
        (
            {"compile": True, "activation_budget": 0.5, "use_checkpoint": True},
            "`activation_budget` must be None with `use_checkpoint`, but is 0.5",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bmt.init_distributed(**settings)


def test_a_budget_takes_the_place_of_recomputed_blocks() -> None:
    gpu = torch.device("cuda")
    assert TorchEngine(gpu, compile=True).use_checkpoint
    assert not TorchEngine(gpu, compile=True, activation_budget=0.5).use_checkpoint


def stack(budget: float | None) -> Encoder:
    torch.manual_seed(0)
    with use_engine(TorchEngine(CPU, compile=True, activation_budget=budget)):
        return Encoder(1, 16, 96, HEADS, DIM, norm_bias=True, ffn_bias=True)


def trained(model: Encoder) -> tuple[int, list[Tensor]]:
    """The bytes of all that forward keeps; the output and all gradients."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch.manual_seed(1)
    x = torch.randn(2, LENGTH, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x, AttentionMask(causal=True))
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    output.square().mean().backward()
    gradients = [parameter.grad for parameter in (x, *model.parameters()) if parameter.grad is not None]
    assert len(gradients) == 1 + len(list(model.parameters()))
    return size, [output, *gradients]


def test_less_is_kept_and_the_same_computed() -> None:
    from torch._functorch import config, partitioners

    op_list = partitioners.get_default_op_list
    sizes, results = zip(*(trained(stack(budget)) for budget in (None, 1.0, 0.5, 0.2)), strict=True)
    assert sizes[0] == sizes[1]
    assert sizes[1] > 1.3 * sizes[2] > 1.3**2 * sizes[3]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)
    # Other compiled code knows nothing of it.
    assert config.activation_memory_budget == 1
    assert partitioners.get_default_op_list is op_list


def of_cudnn(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    output: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[0]
    return output


def of_ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from model_center.layer.kernels.fused_attention import fused_attention

    output: Tensor = fused_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    return output


def block_of(attend: Callable[..., Tensor]) -> torch.nn.Module:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projections = torch.nn.ModuleList(torch.nn.Linear(HEADS * DIM, HEADS * DIM) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            *each, last = self.projections
            heads = (project(x).view(2, LENGTH, HEADS, DIM).transpose(1, 2) for project in each)
            attended: Tensor = last(attend(*heads).transpose(1, 2).flatten(2))
            return x + attended

    return Block().to(META, torch.bfloat16)


class Operators(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("attend", "name"),
    [(of_cudnn, "aten._scaled_dot_product_cudnn_attention.default"), (of_ours, "model_center.attention.default")],
)
def test_attention_is_the_last_to_be_computed_again(attend: Callable[..., Tensor], name: str) -> None:
    if attend is of_ours:
        pytest.importorskip("triton")
    block = block_of(attend)
    again = {}
    for budget in (1.0, 0.5, 0.0):
        torch._dynamo.reset()
        output = compiled_forward(type(block), budget)(
            block, torch.empty(2, LENGTH, HEADS * DIM, dtype=torch.bfloat16, device=META, requires_grad=True)
        )
        with Operators() as operators:
            output.sum().backward()
        again[budget] = (operators.calls[name], operators.calls["aten.addmm.default"])
    assert again[1.0] == (0, 0)
    assert again[0.5][0] == 0
    assert again[0.5][1] > 0
    assert again[0.0][0] == 1
