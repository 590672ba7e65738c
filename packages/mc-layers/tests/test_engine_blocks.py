"""Blocks: transparent, recomputed in backward, and open to what other parts of PyTorch do to modules."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model_center.engine import CheckpointBlock, TorchEngine, TransformerBlockList, use_engine


class Layer(torch.nn.Module):
    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(4, 4)
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.tanh(self.dense(self.dropout(x))) + self.offset
        return y if bias is None else y + bias


class CountingLayer(Layer):
    calls = 0

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        return super().forward(x, bias)


@pytest.fixture(autouse=True, params=[True, False], ids=["recomputed", "kept"])
def engine(request: pytest.FixtureRequest) -> Iterator[TorchEngine]:
    with use_engine(TorchEngine(torch.device("cpu"), use_checkpoint=request.param)) as engine:
        yield engine


def test_names_and_attributes_stay() -> None:
    plain = torch.nn.ModuleList([Layer(), Layer()])
    names = list(plain.state_dict())
    blocks = TransformerBlockList(plain)
    assert list(blocks.state_dict()) == names
    assert [name for name, _ in blocks.named_modules()] == [name for name, _ in plain.named_modules()]
    assert isinstance(blocks[0], Layer)
    assert blocks[0].dense.in_features == 4
    assert repr(blocks[0]) == repr(Layer())
    assert len(blocks) == 2
    assert [block is plain[index] for index, block in enumerate(blocks)] == [True, True]


def test_a_block_is_prepared_once() -> None:
    block = CheckpointBlock(Layer())
    assert CheckpointBlock(block) is block
    assert TransformerBlockList([block])[0] is block
    assert type(block).__mro__.count(Layer) == 1


def test_the_list_feeds_each_block_the_previous_ones_output() -> None:
    blocks = TransformerBlockList(Layer() for _ in range(3)).eval()
    x, bias = torch.rand(2, 4), torch.rand(4)
    expected = x
    for block in blocks:
        expected = block(expected, bias)
    assert torch.equal(blocks(x, bias), expected)
    assert torch.equal(TransformerBlockList([])(x), x)


def test_gradients_and_dropout_are_those_of_a_plain_module(engine: TorchEngine) -> None:
    plain = CountingLayer()
    block = CheckpointBlock(copy.deepcopy(plain))
    gradients = []
    for module in (plain, block):
        torch.manual_seed(5)
        x = torch.rand(8, 4, requires_grad=True)
        module(x, x * 2).square().sum().backward()
        assert isinstance(x.grad, torch.Tensor)
        gradients.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    assert plain.calls == 1
    assert block.calls == (2 if engine.use_checkpoint else 1)


def test_nothing_is_recomputed_without_gradients() -> None:
    block = CheckpointBlock(CountingLayer())
    with torch.no_grad():
        block(torch.rand(2, 4))
    assert block.calls == 1


def test_keyword_arguments_are_refused() -> None:
    # BMTrain's blocks would drop them without a word.
    block = CheckpointBlock(Layer())
    with pytest.raises(TypeError, match="unexpected keyword argument 'bias'"):
        block(torch.rand(2, 4), bias=torch.rand(4))


def test_train_and_eval_return_the_module() -> None:
    block = CheckpointBlock(Layer())
    assert block.eval() is block
    assert not block.dropout.training
    assert block.train() is block
    assert block.dropout.training


def test_a_copy_is_independent_and_still_a_block(engine: TorchEngine) -> None:
    blocks: Any = TransformerBlockList([CountingLayer()]).eval()
    twin: Any = copy.deepcopy(blocks)
    with torch.no_grad():
        twin[0].dense.weight.zero_()
    x = torch.rand(2, 4)
    assert not torch.equal(blocks(x), twin(x))
    assert torch.equal(twin(x), torch.tanh(twin[0].dense.bias).expand(2, 4) + 1)
    twin[0].calls = 0
    twin(x).sum().backward()
    assert twin[0].calls == (2 if engine.use_checkpoint else 1)
    assert blocks[0].dense.weight.grad is None


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_block_is_still_a_block(protocol: int, engine: TorchEngine) -> None:
    blocks: Any = TransformerBlockList([CountingLayer()]).eval()
    x, other = torch.rand(2, 4), TorchEngine(torch.device("cpu"), use_checkpoint=not engine.use_checkpoint)
    with use_engine(other):  # blocks keep the settings that they were made with
        twin = pickle.loads(pickle.dumps(blocks, protocol))
    assert type(twin[0]) is type(blocks[0])
    assert list(twin.state_dict()) == list(blocks.state_dict())
    assert all(torch.equal(blocks.state_dict()[name], tensor) for name, tensor in twin.state_dict().items())
    assert torch.equal(twin(x), blocks(x))
    twin[0].calls = 0
    twin(x).sum().backward()
    assert twin[0].calls == (2 if engine.use_checkpoint else 1)
    assert blocks[0].dense.weight.grad is None


class MadeWithArguments(Layer):
    """Pickled in a way of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.size,), self.__dict__


def test_a_blocks_own_way_of_pickling_stays() -> None:
    block = CheckpointBlock(MadeWithArguments(7))
    for twin in (pickle.loads(pickle.dumps(block)), copy.deepcopy(block), copy.copy(block)):
        assert type(twin) is type(block)
        assert twin.size == 7
        assert torch.equal(twin.dense.weight, block.dense.weight)


def test_state_moves_between_blocks_and_plain_modules() -> None:
    plain = torch.nn.ModuleList([Layer(), Layer()])
    blocks = TransformerBlockList([Layer(), Layer()])
    blocks.load_state_dict(plain.state_dict())
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in blocks.state_dict().items())


def test_a_block_compiles_in_place() -> None:
    block = CheckpointBlock(Layer()).eval()
    x = torch.rand(2, 4, requires_grad=True)
    expected = block(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    block.compile(backend="aot_eager", fullgraph=True)
    found = block(x)
    (found_gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradient, expected_gradient)


def test_a_block_can_be_sharded_in_place(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    blocks: Any = TransformerBlockList([Layer(), Layer()]).eval()
    names = list(blocks.state_dict())
    x = torch.rand(2, 4, requires_grad=True)
    expected = blocks(x)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    rendezvous = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(blocks_root := torch.nn.Sequential(blocks), mesh=mesh)
        found = blocks_root(x)
        found.sum().backward()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(x.grad, expected_gradient)
        assert isinstance(blocks[0].dense.weight, DTensor)
        assert isinstance(blocks[0].dense.weight.grad, DTensor)
        assert list(blocks.state_dict()) == names
    finally:
        torch.distributed.destroy_process_group()
