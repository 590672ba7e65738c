"""Cached decoding equals the full pass in every decoder family, in pieces and by tokens; beams can be reordered."""

from typing import Any

import pytest
import torch
from own_families import ROWS, Row, batch
from torch import Tensor
from torch.testing import assert_close

from model_center.layer import AttentionMask

PIECES = [[4, 1, 1, 3], [3, 6], [3, 1, 1, 1, 1, 1, 1]]
decoders = pytest.mark.parametrize("row", [row for row in ROWS if row.causal], ids=lambda row: row.name)
IDS, LENGTH = batch(5, [9, 6], 9)
CONTEXT = (torch.arange(9) < 3).expand(2, -1)  # CPM-1's, within the first piece: context sees all of itself
SOURCE, SOURCE_LENGTH = batch(6, [5, 3], 5)


def call(row: Row, model: Any, start: int, end: int, **more: Any) -> Any:
    """The model on positions `start` to `end`; what describes keys covers all positions so far."""
    ids = IDS[:, start:end]
    if row.name == "cpm1":
        more = {"return_logits": False, **more}
        return model(ids, LENGTH, CONTEXT[:, :end], torch.zeros(2, end, dtype=torch.long), **more)
    if row.name in ("t5", "cpm2"):
        source = SOURCE if start == 0 else None  # the cache holds what the decoder needs of the encoder
        return model(source, SOURCE_LENGTH, ids, LENGTH, **{"return_logits": False, **more})
    return model(ids, LENGTH, **more)


@decoders
@pytest.mark.parametrize("pieces", PIECES, ids=str)
@torch.no_grad()
def test_pieces_equal_the_full_pass(row: Row, pieces: list[int]) -> None:
    model = row.make()
    valid = torch.arange(9) < LENGTH[:, None]
    full, logits = (call(row, model, 0, 9, return_logits=wanted) for wanted in (False, True))
    cache = model.new_cache(4)  # too small: room is made when more arrives
    states: list[Tensor] = []
    for size in pieces:
        output = call(row, model, cache.length, cache.length + size, past_key_values=cache)
        assert output.past_key_values is cache
        states.append(output.last_hidden_state)
    assert cache.length == 9
    together = torch.cat(states, dim=1)
    assert_close(together[valid], full.last_hidden_state[valid], rtol=1e-5, atol=1e-5)
    assert_close(model.logits(together)[valid], logits[valid], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_packed_documents_are_cached() -> None:
    model = next(row for row in ROWS if row.name == "t5").make()
    sources, documents = torch.tensor([[0, 0, 1, 1, 1]]).expand(2, -1), (torch.arange(9) >= 4).long().expand(2, -1)
    source = AttentionMask(documents=sources)

    def states(start: int, end: int, **more: Any) -> Tensor:
        mask = AttentionMask(documents=documents[:, :end])
        masks = {"attention_mask": source, "decoder_attention_mask": mask}
        result: Tensor = model(SOURCE, decoder_input_ids=IDS[:, start:end], **masks, **more).last_hidden_state
        return result

    cache = model.new_cache(9)
    pieces = [states(start, end, past_key_values=cache) for start, end in ((0, 3), (3, 6), (6, 7), (7, 9))]
    assert_close(torch.cat(pieces, dim=1), states(0, 9), rtol=1e-5, atol=1e-5)


@decoders
@torch.no_grad()
def test_reordered_rows_continue_each_other(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    model = row.make()
    monkeypatch.setitem(globals(), "LENGTH", torch.tensor([9, 9]))
    cache = call(row, model, 0, 6, use_cache=True).past_key_values
    expected = call(row, model, 0, 7).last_hidden_state[:, -1]
    cache.reorder(torch.tensor([1, 0]))
    for name in ("IDS", "SOURCE_LENGTH"):
        monkeypatch.setitem(globals(), name, globals()[name].flip(0))
    output = call(row, model, 6, 7, past_key_values=cache).last_hidden_state[:, -1]
    assert_close(output, expected.flip(0), rtol=1e-5, atol=1e-5)


@decoders
def test_training_is_possible_beside_a_cache(row: Row) -> None:
    model = row.make()
    cache = call(row, model, 0, 6, use_cache=True).past_key_values
    call(row, model, 6, 9, past_key_values=cache).last_hidden_state.sum().backward()
    assert model.input_embedding.weight.grad is not None
