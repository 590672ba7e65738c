"""Compiled blocks: what they compute, how often they are compiled, and what is not."""

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from model_center import engine as bmt
from model_center.engine import CheckpointBlock, Engine, TorchEngine, current_engine, recompute, use_engine
from model_center.layer import (
    AttentionMask,
    Decoder,
    Encoder,
    KeyValueCache,
    RelativePositionEmbedding,
    RotaryEmbedding,
)

CPU = torch.device("cpu")


def forget() -> None:
    torch._dynamo.reset()
    counters.clear()
    recompute._block_class.cache_clear()


@pytest.fixture(autouse=True)
def nothing_compiled(cpu_engine: None) -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Graphs are made, but not machine code, which takes half a minute each time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=getattr(request, "param", "eager")))


def compiling(**settings: Any) -> TorchEngine:
    engine = TorchEngine(CPU, compile=True, **settings)
    counters.clear()  # of the trial
    return engine


def graphs() -> int:
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


class EncoderShape(torch.nn.Module):
    """As BERT: padding on the right, biases everywhere."""

    kinds = 1

    def __init__(self) -> None:
        super().__init__()
        self.stack = Encoder(2, 16, 24, 2, 8, norm_bias=True, att_bias=True, ffn_bias=True)

    def forward(self, x: Tensor) -> Any:
        return self.stack(x, AttentionMask(lengths=torch.tensor([x.shape[1], 3])))


class DecoderShape(torch.nn.Module):
    """As GPT-J, with packed documents."""

    kinds = 1

    def __init__(self) -> None:
        super().__init__()
        self.stack = Encoder(1, 16, 24, 2, 8, pos_bias_type="rotary", parallel_ffn=True, attn_scale=True)
        self.rotary = RotaryEmbedding(4)

    def forward(self, x: Tensor) -> Any:
        documents = (torch.arange(x.shape[1]) > 2).long().expand(2, -1)
        return self.stack(x, AttentionMask(causal=True, documents=documents), self.rotary)


class Seq2SeqShape(torch.nn.Module):
    """As T5: relative biases, cross-attention, lengths of two kinds."""

    kinds = 2

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(1, 16, 24, 2, 8, pos_bias_type="relative")
        self.decoder = Decoder(1, 16, 24, 2, 8, pos_bias_type="relative")
        self.encoder_bias = RelativePositionEmbedding(2, bidirectional=True)
        self.decoder_bias = RelativePositionEmbedding(2)

    def forward(self, x: Tensor) -> Any:
        mask, length = AttentionMask(lengths=torch.tensor([x.shape[1], 3])), x.shape[1] - 1
        encoded = self.encoder(x, mask, self.encoder_bias.by_distance(length + 1, length + 1))
        bias = self.decoder_bias.by_distance(length, length)
        return self.decoder(x[:, 1:].contiguous(), AttentionMask(causal=True), bias, encoded, mask)


def made(shape: Callable[[], torch.nn.Module], engine: Engine) -> torch.nn.Module:
    torch.manual_seed(0)
    with use_engine(engine):
        return shape()


def trained(model: torch.nn.Module, length: int) -> list[Tensor]:
    """The output and all gradients of one step."""
    model.zero_grad()
    torch.manual_seed(length)
    x = torch.randn(2, length, 16, requires_grad=True)
    output = model(x)
    output.square().mean().backward()
    return [output, *(parameter.grad for parameter in (x, *model.parameters()) if parameter.grad is not None)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 8
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("shape", "recomputed", "traced"),
    [(EncoderShape, True, "aot_eager"), (DecoderShape, False, "eager"), (Seq2SeqShape, True, "eager")],
    indirect=["traced"],
)
def test_blocks_compute_the_same_whatever_the_length(shape: Any, recomputed: bool) -> None:
    model, plain = made(shape, compiling(use_checkpoint=recomputed)), made(shape, TorchEngine(CPU))
    assert list(model.state_dict()) == list(plain.state_dict())
    for length in (5, 9, 7):
        assert_equal(trained(model, length), trained(plain, length))
    assert 0 < graphs() <= 2 * shape.kinds


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_machine_code_computes_the_same() -> None:
    bmt.init_distributed(compile=True, use_checkpoint=True)
    assert current_engine().compiles
    counters.clear()
    model = made(EncoderShape, current_engine())
    assert_equal(trained(model, 5), trained(made(EncoderShape, TorchEngine(CPU)), 5))
    assert graphs() == 1


@pytest.mark.usefixtures("traced")
def test_dropout_is_repeated_and_follows_the_mode() -> None:
    with use_engine(compiling(use_checkpoint=True)):
        block = CheckpointBlock(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)))
    x = torch.ones(64, 8, requires_grad=True)
    output = block(x)
    output.sum().backward()
    (gradient,) = torch.autograd.grad(((block[0](x)) * (output != 0) * 2).sum(), x)
    assert torch.equal(x.grad, gradient)  # type: ignore[arg-type] # the same elements were dropped again
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block[0](x))


@pytest.mark.usefixtures("traced")
def test_decoding_is_not_compiled() -> None:
    model: Any = made(DecoderShape, compiling())
    x, mask = torch.randn(2, 6, 16), AttentionMask(causal=True)
    cache = KeyValueCache(num_layers=1, max_length=6)
    with torch.no_grad():
        steps = [model.stack(x[:, [position]], mask, model.rotary, cache=cache) for position in range(6)]
        assert graphs() == 0
        torch.testing.assert_close(torch.cat(steps, dim=1), model.stack(x, mask, model.rotary))
    assert graphs() == 1


@pytest.mark.usefixtures("traced")
def test_weights_of_8_bits() -> None:
    model, plain = (
        made(partial(Encoder, 1, 16, 24, 2, 8, int8=True), engine) for engine in (compiling(), TorchEngine(CPU))
    )
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(x, None), plain(x, None), rtol=1e-6, atol=1e-6)
    assert graphs() == 1
    with pytest.raises(ValueError, match="can't be trained"):
        model(x, None).sum().backward()


@pytest.mark.usefixtures("traced")
def test_a_copy_is_independent_and_shares_graphs() -> None:
    model = made(EncoderShape, compiling())
    twin = copy.deepcopy(model)
    expected = trained(model, 5)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_equal(trained(twin, 5), expected)
    assert graphs() == 1


@pytest.mark.usefixtures("traced")
def test_what_is_pickled_compiles_as_before() -> None:
    model: Any = made(EncoderShape, compiling())
    expected = trained(model, 5)
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin.stack.layers[0]) is type(model.stack.layers[0])
    forget()
    assert_equal(trained(twin, 5), expected)
    assert graphs() == 1


def test_without_a_compiler_the_error_says_what_to_do() -> None:
    import torch._inductor.config
    from torch._inductor.utils import fresh_cache

    forget()
    with (
        fresh_cache(),
        torch._inductor.config.patch({"cpp.cxx": (None, "absent-compiler")}),
        pytest.raises(ValueError, match=r"`compile` must be False here, .* device 'cpu' .*install a C\+\+ compiler"),
    ):
        bmt.init_distributed(compile=True)
    assert not current_engine().compiles
