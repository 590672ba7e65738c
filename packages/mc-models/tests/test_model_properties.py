"""What must hold of every family whatever the input: padding, order, packing, causality."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from own_families import ROWS, Row, batch
from torch import Tensor
from torch.testing import assert_close

from model_center.layer import AttentionMask

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
few = settings(max_examples=12, deadline=None)
lengths_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=4)
MODELS = {row.name: row.make() for row in ROWS}


def states(row: Row, ids: Tensor, length: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = row.call(MODELS[row.name], ids, length, **more).last_hidden_state
    return output


def close(ours: Tensor, expected: Tensor) -> None:
    assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@rows
@few
@given(lengths=lengths_strategy, seed=st.integers(0, 1000))
def test_padding_content_changes_nothing(row: Row, lengths: list[int], seed: int) -> None:
    ids, length = batch(seed, lengths, 9)
    valid = torch.arange(9) < length[:, None]
    others = torch.where(valid, ids, batch(seed + 1, lengths, 9)[0])
    assert torch.equal(states(row, ids, length)[valid], states(row, others, length)[valid])


@rows
@few
@given(lengths=lengths_strategy, seed=st.integers(0, 1000))
def test_a_batch_is_its_rows_in_any_order(row: Row, lengths: list[int], seed: int) -> None:
    ids, length = batch(seed, lengths, 9)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    together = states(row, ids, length)
    close(states(row, ids[order], length[order]), together[order])
    for number, own in enumerate(lengths):
        alone = states(row, ids[number : number + 1, :own], length[number : number + 1])
        close(together[number, :own], alone[0])


@pytest.mark.parametrize("row", [row for row in ROWS if row.causal], ids=lambda row: row.name)
@few
@given(where=st.integers(1, 8), seed=st.integers(0, 1000))
def test_causal_models_never_see_the_future(row: Row, where: int, seed: int) -> None:
    ids, length = batch(seed, [9, 9], 9)
    changed = ids.clone()
    changed[:, where:] = batch(seed + 1, [9, 9], 9)[0][:, where:]
    before, after = states(row, ids, length), states(row, changed, length)
    close(after[:, :where], before[:, :where])
    if not torch.equal(ids, changed):
        assert not torch.allclose(after[:, where:], before[:, where:])


def test_encoders_see_both_directions() -> None:
    ids, length = batch(0, [9], 9)
    changed = ids.clone()
    changed[0, -1] += 1
    assert not torch.allclose(states(ROWS[0], ids, length)[:, 0], states(ROWS[0], changed, length)[:, 0])


PACKED = [row for row in ROWS if row.name != "cpm2"]


@pytest.mark.parametrize("row", PACKED, ids=lambda row: row.name)
@few
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_packed_documents_are_separate_documents(row: Row, lengths: list[int], seed: int) -> None:
    documents = [batch(seed + number, [length], length)[0] for number, length in enumerate(lengths)]
    apart = [states(row, ids, torch.tensor([ids.shape[1]])) for ids in documents]
    ids = torch.cat(documents, dim=1)
    span = torch.cat([torch.full((1, length), number) for number, length in enumerate(lengths)], dim=1)
    positions = torch.cat([torch.arange(length)[None] for length in lengths], dim=1)
    model: Any = MODELS[row.name]
    with torch.no_grad():
        if row.name == "cpm1":
            context = torch.zeros_like(ids)
            together = model(ids, torch.tensor([ids.shape[1]]), context, span, return_logits=False)
        elif row.name == "t5":
            source = torch.arange(6).expand(1, -1).repeat(1, len(lengths)) + 1
            sources = torch.arange(len(lengths)).repeat_interleave(6)[None]
            is_padding = (torch.arange(6) >= 5).repeat(len(lengths))[None]
            together = model(
                source,
                decoder_input_ids=ids,
                attention_mask=AttentionMask(documents=sources, key_padding=is_padding),
                decoder_attention_mask=AttentionMask(documents=span),
            )
        else:
            more = {} if row.name == "cpm1" else {"position_ids": positions}
            together = model(ids, attention_mask=AttentionMask(documents=span), **more)
    close(together.last_hidden_state, torch.cat(apart, dim=1))


@few
@given(context=st.integers(0, 7), length=st.integers(1, 9), seed=st.integers(0, 1000))
def test_cpm1_mask_is_the_documented_one(context: int, length: int, seed: int) -> None:
    """A position sees the context of its span, and if it is not context itself, what comes before it in its span."""
    row = next(row for row in ROWS if row.name == "cpm1")
    model: Any = MODELS["cpm1"]
    ids, lengths = batch(seed, [length], 9)
    is_context = (torch.arange(9) < context)[None]
    span = (torch.arange(9) >= 6).long()[None]
    allowed = torch.zeros(1, 9, 9, dtype=torch.bool)
    for query in range(9):
        for key in range(9):
            sees = is_context[0, key] or (not is_context[0, query] and key <= query)
            allowed[0, query, key] = sees and span[0, query] == span[0, key] and key < length
    with torch.no_grad():
        ours = model(ids, lengths, is_context, span, return_logits=False).last_hidden_state
        attentions = model(ids, lengths, is_context, span, return_logits=False, output_attentions=True).attentions
    assert row.causal
    for layer in attentions:
        assert not layer.masked_select(~allowed[:, None]).any()
        assert (layer[:, :, :length].masked_select(allowed[:, None, :length]) > 0).all()
    assert torch.isfinite(ours).all()
