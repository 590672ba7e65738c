"""AttentionMask: what it means, that it stays small, and what models see through it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from model_center.engine import TorchEngine, use_engine
from model_center.layer import AttentionMask, Encoder, RelativePositionEmbedding, RotaryEmbedding
from model_center.layer.attention_mask import ScoreMask, bounds_of_groups, resolve_mask

F64 = torch.float64
CPU = torch.device("cpu")
examples = settings(max_examples=60, deadline=None)


@st.composite
def masks(draw: st.DrawFn) -> tuple[AttentionMask, int, int]:
    """Any combination of fields, with numbers of queries and keys."""
    batch, len_q, offset, beyond = (draw(st.integers(low, high)) for low, high in ((1, 3), (1, 5), (0, 3), (0, 2)))
    len_k = offset + len_q + beyond

    def maybe(shape: tuple[int, ...], high: int) -> Tensor | None:
        size = torch.Size(shape).numel()
        values = draw(st.none() | st.lists(st.integers(0, high), min_size=size, max_size=size))
        return None if values is None else torch.tensor(values).view(shape)

    def boolean(shape: tuple[int, ...]) -> Tensor | None:
        values = maybe(shape, 1)
        return None if values is None else values.bool()

    mask = AttentionMask(
        causal=draw(st.booleans()),
        lengths=maybe((batch,), len_k),
        key_padding=boolean((batch, len_k)),
        documents=maybe((batch, len_k), 2),
        context=boolean((batch, len_k)),
        query_offset=offset,
        dense=boolean((batch, len_q, len_k)),
    )
    return mask, len_q, len_k


def may_attend(mask: AttentionMask, b: int, query: int, key: int) -> bool:
    """The definition, one pair at a time; `query` counts from the first query."""
    position = query + mask.query_offset
    ordered = key <= position or not (mask.causal or mask.context is not None)
    if mask.context is not None:
        ordered = bool(mask.context[b, key]) or (ordered and not mask.context[b, position])
    return (
        ordered
        and (mask.lengths is None or key < mask.lengths[b].item())
        and (mask.key_padding is None or not mask.key_padding[b, key])
        and (mask.documents is None or bool(mask.documents[b, key] == mask.documents[b, position]))
        and (mask.dense is None or bool(mask.dense[b, query, key]))
    )


@given(masks())
@examples
def test_materialize_is_the_definition(case: tuple[AttentionMask, int, int]) -> None:
    mask, len_q, len_k = case
    allowed = mask.materialize(len_q, len_k)
    assert allowed.shape[1:] == (1, len_q, len_k)
    for b in range(allowed.shape[0]):
        expected = [[may_attend(mask, b, query, key) for key in range(len_k)] for query in range(len_q)]
        assert allowed[b, 0].tolist() == expected


@given(masks())
@examples
def test_resolved_masks_are_equal_for_every_query_that_is_not_padding(case: tuple[AttentionMask, int, int]) -> None:
    mask, len_q, len_k = case
    allowed = mask.materialize(len_q, len_k)
    resolved = mask.resolve(len_q, len_k, CPU)
    shape = (allowed.shape[0], 1, len_q, len_k)
    dense = resolved.dense(len_q, len_k, CPU)
    seen = torch.ones(shape, dtype=torch.bool) if dense is None else dense.expand(shape)
    if resolved.attends is not None:
        assert torch.equal(resolved.attends.expand(*shape[:3], 1), allowed.any(-1, keepdim=True))
        assert seen.any(-1).all()
        seen = seen & resolved.attends
    if mask.lengths is not None and resolved.is_causal:
        real = torch.arange(len_q) < mask.lengths[:, None]
        seen, allowed = seen & real[:, None, :, None], allowed & real[:, None, :, None]
    assert torch.equal(seen, allowed)


def test_masks_stay_as_small_as_their_structure() -> None:
    lengths = torch.tensor([3, 5])
    padding = torch.zeros(2, 5, dtype=torch.bool)
    causal = ScoreMask(is_causal=True)
    for mask in (AttentionMask(causal=True), AttentionMask(causal=True, lengths=lengths)):
        assert vars(mask.resolve(5, 5, CPU)) == vars(causal)
    for mask in (AttentionMask(), AttentionMask(causal=True, query_offset=4)):
        assert vars(mask.resolve(1, 5, CPU)) == vars(ScoreMask())
    for mask in (
        AttentionMask(lengths=lengths),
        AttentionMask(key_padding=padding),
        AttentionMask(causal=True, key_padding=padding, query_offset=4),
    ):
        resolved = mask.resolve(1, 5, CPU)
        assert resolved.allowed is not None
        assert resolved.allowed.shape == (2, 1, 1, 5)


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6))
@examples
def test_bounds_of_groups(positions: list[tuple[int, bool]]) -> None:
    documents, context = ([position[part] for position in positions] for part in range(2))
    mask = AttentionMask(documents=torch.tensor([documents]), context=torch.tensor([context]))
    resolved = mask.resolve(len(positions), len(positions), CPU)
    context_end = max((number + 1 for number, is_context in enumerate(context) if is_context), default=0)
    alike = next((number for number, document in enumerate(documents) if document != documents[0]), len(documents))
    assert resolved.group_bounds is not None
    assert resolved.group_bounds.tolist() == [[context_end, alike]]


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_a_stack_resolves_its_mask_once(use_checkpoint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def counted(groups: Tensor) -> Tensor:
        calls.append(groups)
        return bounds_of_groups(groups)

    monkeypatch.setattr("model_center.layer.attention_mask.bounds_of_groups", counted)
    with use_engine(TorchEngine(CPU, use_checkpoint=use_checkpoint)):
        model = Encoder(**SIZES)
        model(torch.randn(1, 4, 8), AttentionMask(documents=torch.tensor([[0, 0, 1, 1]]))).sum().backward()
    assert len(calls) == 1


def test_documents_of_queries_and_keys_may_differ() -> None:
    mask = AttentionMask(documents=torch.tensor([[0, 0, 1]]), query_documents=torch.tensor([[1, 0]]))
    assert mask.materialize(2, 3)[0, 0].tolist() == [[False, False, True], [True, True, False]]


SIZES: dict[str, Any] = {"num_layers": 2, "dim_model": 8, "dim_ff": 12, "num_heads": 2, "dim_head": 4}
LENGTH = 6
PositionBias = Tensor | RotaryEmbedding | None


def encoder(pos_bias_type: str) -> tuple[Encoder, Callable[[int], PositionBias]]:
    """A small encoder and what makes its position bias for a length."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"att_init_std": 0.5, "ffn_init_std": 0.5, "norm_bias": True, "attn_scale": True}
    model = Encoder(**SIZES, **options, dtype=F64, pos_bias_type=pos_bias_type).requires_grad_(False)
    relative = RelativePositionEmbedding(2, 8, 10, True, dtype=F64).requires_grad_(False)
    makers: dict[str, Callable[[int], PositionBias]] = {
        "none": lambda length: None,
        "relative": lambda length: relative(length, length),
        "rotary": lambda length: RotaryEmbedding(4),
    }
    return model, makers[pos_bias_type]


ENCODERS = {name: encoder(name) for name in ("none", "relative", "rotary")}
pos_bias_types = st.sampled_from(list(ENCODERS))
hidden = st.integers(0, 2**32).map(
    lambda seed: torch.randn(3, LENGTH, 8, dtype=F64, generator=torch.Generator().manual_seed(seed))
)


@given(
    pos_bias_types,
    hidden,
    hidden,
    st.lists(st.integers(0, LENGTH), min_size=3, max_size=3),
    st.sampled_from(["right", "left"]),
    st.booleans(),
)
@examples
def test_what_stands_in_padding_never_matters(
    pos_bias_type: str, x: Tensor, other: Tensor, lengths: list[int], side: str, causal: bool
) -> None:
    model, bias = ENCODERS[pos_bias_type]
    real = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    mask = AttentionMask(causal=causal, lengths=torch.tensor(lengths))
    if side == "left":
        real = real.flip(1)
        mask = AttentionMask(causal=causal, key_padding=~real)
    outputs = [model(states, mask, bias(LENGTH)) for states in (x, torch.where(real[..., None], x, 1e3 * other))]
    assert_close(outputs[0][real], outputs[1][real])
    assert all(output.isfinite().all() for output in outputs)


@given(pos_bias_types, hidden, st.permutations(range(3)))
@examples
def test_the_order_of_a_batch_does_not_matter(pos_bias_type: str, x: Tensor, order: list[int]) -> None:
    model, bias = ENCODERS[pos_bias_type]
    lengths = torch.tensor([6, 3, 1])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    output = model(x, AttentionMask(lengths=lengths, documents=documents), bias(LENGTH))
    shuffled = model(x[order], AttentionMask(lengths=lengths[order], documents=documents[order]), bias(LENGTH))
    assert_close(shuffled, output[order])


@given(pos_bias_types, hidden, st.integers(1, LENGTH - 1), st.booleans())
@examples
def test_packed_documents_are_as_if_alone(pos_bias_type: str, x: Tensor, border: int, causal: bool) -> None:
    model, bias = ENCODERS[pos_bias_type]
    documents = (torch.arange(LENGTH) >= border).long().expand(3, -1)
    packed = model(x, AttentionMask(causal=causal, documents=documents), bias(LENGTH))
    alone = [model(part, AttentionMask(causal=causal), bias(part.shape[1])) for part in (x[:, :border], x[:, border:])]
    assert_close(packed, torch.cat(alone, 1))


@given(pos_bias_types, hidden, hidden, st.integers(1, LENGTH - 1), st.sampled_from(["causal", "padding", "context"]))
@examples
def test_causal_models_never_see_the_future(pos_bias_type: str, x: Tensor, other: Tensor, now: int, kind: str) -> None:
    model, bias = ENCODERS[pos_bias_type]
    mask = {
        "causal": AttentionMask(causal=True),
        "padding": AttentionMask(causal=True, key_padding=torch.arange(LENGTH).expand(3, -1) == 0),
        "context": AttentionMask(context=torch.arange(LENGTH).expand(3, -1) < now),
    }[kind]
    changed = torch.cat([x[:, :now], other[:, now:]], 1)
    assert_close(model(x, mask, bias(LENGTH))[:, :now], model(changed, mask, bias(LENGTH))[:, :now])


def resolve(mask: AttentionMask | Tensor | None, len_q: int = 4, len_k: int = 5) -> ScoreMask:
    return resolve_mask(mask, batch=2, len_q=len_q, len_k=len_k, query_offset=0, device=CPU)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AttentionMask(lengths=torch.ones(2, 3).long()),
            r"`lengths` .* an integer tensor with 1 dimension, but",
        ),
        (lambda: AttentionMask(lengths=torch.ones(2)), r"`lengths` .* but is torch.float32"),
        (
            lambda: AttentionMask(key_padding=torch.ones(2, 5).long()),
            r"`key_padding` .* a boolean tensor with 2 dimens",
        ),
        (
            lambda: AttentionMask(query_documents=torch.ones(2, 4).long()),
            r"`query_documents` must be given together with `documents`",
        ),
        (lambda: AttentionMask(query_offset=-1), r"`query_offset` must not be negative, but is -1"),
        (
            lambda: resolve(torch.ones(2, 5).bool()),
            r"shape \(batch, len_q, len_k\), but is torch.bool of shape \(2, 5\)",
        ),
        (lambda: resolve(torch.ones(2, 4, 5)), r"boolean or 0/1 integer tensor .* but is torch.float32"),
        (lambda: resolve(torch.ones(2, 4, 4).bool()), r"`dense` .* \(batch, 4, 5\) for 4 queries and 5 keys, but"),
        (
            lambda: resolve(torch.ones(3, 4, 5).bool()),
            r"`dense` .* batch size of the queries \(2\) or 1, but .*\(3, 4, 5\)",
        ),
        (lambda: resolve(AttentionMask(key_padding=torch.ones(2, 4).bool())), r"`key_padding` .* \(batch, 5\) for"),
        (lambda: resolve(AttentionMask(lengths=torch.ones(3).long())), r"`lengths` .* batch size of the queries \(2\)"),
        (lambda: resolve(AttentionMask(documents=torch.ones(2, 3).long()), 4, 3), r"cover 3; for cross-attention give"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_offset_of_ones_own_is_kept() -> None:
    mask = AttentionMask(causal=True, query_offset=2)
    assert mask.at_offset(5) is mask
    assert replace(mask, query_offset=0).at_offset(5).query_offset == 5
