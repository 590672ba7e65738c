"""Stacks that leave padding out, against the same stacks with padding."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from model_center.engine import TorchEngine, use_engine
from model_center.layer import Attention, AttentionMask, Encoder, RelativePositionEmbedding, RotaryEmbedding, stack
from model_center.layer.attention_kernels import Packing
from model_center.layer.kernels import requirements
from model_center.layer.padding import RealPositions, real_positions, saves_padding

F64 = torch.float64
LENGTH = 7


@pytest.fixture
def leave_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Lets stacks leave padding out on the CPU as well; gives what they found."""
    found: list[Any] = []

    def recorded(*arguments: Any, **options: Any) -> Any:
        found.append(real_positions(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(stack, "saves_padding", lambda *_: True)
    monkeypatch.setattr(stack, "real_positions", recorded)
    yield found
    assert found


def encoder(**options: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(2, 8, 12, 2, 4, dtype=F64, norm_bias=True, att_init_std=0.4, ffn_init_std=0.4, **options)


def states(batch: int = 3) -> Tensor:
    return torch.randn(batch, LENGTH, 8, dtype=F64, generator=torch.Generator().manual_seed(1))


MASKS: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": torch.tensor([7, 3, 4])},
    "an empty row": {"lengths": torch.tensor([5, 0, 2])},
    "causal": {"lengths": torch.tensor([6, 1, 4]), "causal": True},
    "padding on the left": {"key_padding": torch.arange(LENGTH) < torch.tensor([[0], [3], [5]])},
    "documents": {"documents": torch.tensor([[0, 0, 1, 1, 1, 2, 2], [3] * 7, [0, 1, 2, 3, 4, 5, 6]])},
    "causal documents": {
        "documents": torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0] * 7, [4, 4, 4, 5, 5, 5, 5]]),
        "lengths": torch.tensor([7, 5, 6]),
        "causal": True,
    },
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("positions", ["none", "relative", "rotary"])
@pytest.mark.parametrize("recompute", [False, True])
def test_results_and_gradients(mask: Any, positions: str, recompute: bool, leave_out: list[Any]) -> None:
    attention_mask = AttentionMask(**mask)
    with use_engine(TorchEngine(torch.device("cpu"), use_checkpoint=recompute)):
        model = encoder(pos_bias_type=positions, post_layer_norm=positions == "none", num_heads_kv=1)
        bias: Any = None
        if positions == "relative":
            relative = RelativePositionEmbedding(2, 8, 6, bidirectional=True, dtype=F64)
            bias = relative.by_distance(LENGTH, LENGTH)
        if positions == "rotary":
            ids = torch.arange(LENGTH) + torch.tensor([[0], [2], [5]])
            bias = RotaryEmbedding(2).positions(ids, F64)
    real = attention_mask.real_keys(LENGTH).expand(3, -1)
    weights = torch.randn(3, LENGTH, 8, dtype=F64, generator=torch.Generator().manual_seed(2)) * real[..., None]
    results: list[list[Any]] = []
    for hidden_states in (states().requires_grad_(), states().requires_grad_()):
        if results:
            # With more asked for, the stack runs with padding.
            output = model(hidden_states, attention_mask, bias, output_hidden_states=True).last_hidden_state
        else:
            output = model(hidden_states, attention_mask, bias)
            assert leave_out[0] is not None
            assert torch.equal(output[~real], hidden_states[~real])
        (output * weights).sum().backward(retain_graph=True)
        gradients = [hidden_states.grad, *(parameter.grad for parameter in model.parameters())]
        model.zero_grad()
        results.append([output[real], *gradients])
    for packed, padded in zip(*results, strict=True):
        assert_close(packed, padded)


@pytest.mark.parametrize(
    ("mask", "adjacent"),
    [
        ({"documents": torch.tensor([[0, 0, 1, 1, 0, 0, 0]] * 3)}, False),
        ({"key_padding": torch.tensor([[False, True, True, False, True, True, True]] * 3)}, True),
        ({"lengths": torch.tensor([7, 7, 6])}, False),
        ({"lengths": torch.tensor([0, 0, 0])}, False),
        ({"lengths": torch.tensor([3, 3, 3]), "context": torch.zeros(3, LENGTH, dtype=torch.bool)}, False),
        ({"lengths": torch.tensor([3, 3, 3]), "dense": torch.ones(1, LENGTH, LENGTH, dtype=torch.bool)}, False),
        ({"lengths": torch.tensor([3, 3])}, False),
        ({"causal": True}, False),
    ],
    ids=["scattered document", "holes", "little padding", "nothing", "context", "dense", "wrong size", "no padding"],
)
def test_where_padding_stays(mask: Any, adjacent: bool) -> None:
    assert real_positions(AttentionMask(**mask), 3, LENGTH, adjacent=adjacent) is None


def test_a_document_in_two_places_is_one(leave_out: list[Any]) -> None:
    mask = AttentionMask(documents=torch.tensor([[0, 0, 1, 1, 0, 0, 0]]))
    model = encoder()
    dense = model(states(1), mask.materialize(LENGTH, LENGTH)[:, 0])
    assert_close(model(states(1), mask), dense)
    assert leave_out == [None]


@pytest.mark.parametrize("most", [9, 10])
def test_documents_stay_in_their_rows_if_they_are_too_many(
    most: int, monkeypatch: pytest.MonkeyPatch, leave_out: list[Any]
) -> None:
    monkeypatch.setattr(requirements, "_MOST_HEADS", most)
    taken = []
    original = RealPositions.take

    def take(positions: RealPositions, x: Tensor) -> Tensor:
        taken.append(positions)
        return original(positions, x)

    monkeypatch.setattr(RealPositions, "take", take)
    mask = AttentionMask(documents=torch.tensor([[0, 1, 2, 3, 3, 4, 4]]))  # five of them, each with two heads
    model = encoder()
    output = model(states(1), mask)
    assert (taken == leave_out) is (most == 10)
    assert_close(output, model(states(1), mask, output_hidden_states=True).last_hidden_state)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_sequences_are_the_runs_of_documents(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=5, max_size=5), min_size=1, max_size=3))
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=len(rows), max_size=len(rows)).filter(any))
    documents = torch.tensor(rows).cumsum(1)
    mask = AttentionMask(documents=documents, lengths=torch.tensor(lengths))
    found = real_positions(mask, len(rows), 5, adjacent=True)
    assert found is not None
    places = [(row, place) for row, length in enumerate(lengths) for place in range(length)]
    assert found.indices.tolist() == [row * 5 + place for row, place in places]
    sequence = found.packing.slots(len(places))[0]
    same = sequence[:, None] == sequence
    expected = [[a[0] == b[0] and bool(documents[a] == documents[b]) for b in places] for a in places]
    assert same.tolist() == expected
    x = torch.rand(len(rows), 5, 2)
    there = torch.full_like(x, 7)
    assert_close(found.put_back(found.take(x), there), x.where(mask.real_keys(5)[..., None], 7))


@pytest.mark.parametrize("positions", ["none", "relative"])
@pytest.mark.usefixtures("leave_out")
def test_compiled_blocks_serve_any_lengths(positions: str) -> None:
    model = encoder(pos_bias_type=positions)
    plain = encoder(pos_bias_type=positions)
    plain.load_state_dict(model.state_dict())
    for layer in model.layers:
        layer.compile(backend="eager", fullgraph=True)
    bias = None
    if positions == "relative":
        bias = RelativePositionEmbedding(2, 8, 6, dtype=F64).by_distance(LENGTH, LENGTH).detach()
    for number, lengths in enumerate([[7, 3, 4], [5, 2, 4], [7, 7, 1], [1, 1, 2]]):
        mask = AttentionMask(lengths=torch.tensor(lengths))
        # The first change tells that lengths change.
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            assert_close(model(states(), mask, bias), plain(states(), mask, bias))


@pytest.mark.usefixtures("leave_out")
def test_a_stack_can_be_compiled_as_a_whole() -> None:
    model, plain = encoder(), encoder()
    plain.load_state_dict(model.state_dict())
    model.compile(backend="eager")
    for lengths in ([7, 3, 4], [5, 2, 4]):
        mask = AttentionMask(lengths=torch.tensor(lengths))
        assert_close(model(states(), mask), plain(states(), mask))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("positions", ["none", "relative", "rotary"])
def test_on_a_gpu(mask: str, positions: str) -> None:
    with use_engine(TorchEngine(torch.device("cuda"), use_checkpoint=False)):
        torch.manual_seed(0)
        options: Any = {"pos_bias_type": positions, "norm_bias": True, "att_init_std": 0.1, "ffn_init_std": 0.1}
        model = Encoder(2, 64, 96, 2, 32, dtype=torch.bfloat16, **options)
        bias: Any = None
        if positions == "relative":
            relative = RelativePositionEmbedding(2, 8, 6, bidirectional=True, dtype=torch.bfloat16)
            bias = relative.by_distance(LENGTH, LENGTH)
        if positions == "rotary":
            bias = RotaryEmbedding(16).positions(torch.arange(LENGTH, device="cuda"))
    if mask == "lengths":  # once for each kind of positions, as compiling takes long
        for layer in model.layers:
            layer.compile()
    parts: Any = {name: part.cuda() if isinstance(part, Tensor) else part for name, part in MASKS[mask].items()}
    attention_mask = AttentionMask(**parts)
    real = attention_mask.real_keys(LENGTH, torch.device("cuda")).expand(3, -1)
    hidden_states = torch.randn(3, LENGTH, 64, device="cuda", dtype=torch.bfloat16)
    assert saves_padding(hidden_states, 32)
    output = model(hidden_states, attention_mask, bias)
    padded = model(hidden_states, attention_mask, bias, output_hidden_states=True).last_hidden_state
    assert torch.equal(output[~real], hidden_states[~real])
    assert_close(output[real].float(), padded[real].float(), rtol=0, atol=0.06)
    output.float().pow(2).sum().backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())  # type: ignore[arg-type]


def test_cpus_keep_padding() -> None:
    assert not saves_padding(states().bfloat16(), 4)


def test_what_packed_attention_refuses() -> None:
    packing = Packing(cumulative=torch.tensor([0, 2, 7], dtype=torch.int32), longest=5)
    attention = Attention(8, 4, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"must have shape \(1, tokens, dim_in\).* is \(3, 7, 8\)"):
        attention(states(), states(), packing)
    with pytest.raises(ValueError, match="`output_attentions` must not be given"):
        attention(states(1), states(1), packing, output_attentions=True)
