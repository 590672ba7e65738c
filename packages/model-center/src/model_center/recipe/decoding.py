"""Greedy decoding: the likeliest token after the other, each computed once with the key-value cache."""

from typing import Protocol

import torch
from torch import Tensor

from model_center import engine
from model_center.model import BaseModel, DecoderLM, Seq2Seq


class Continuation(Protocol):
    """A batch of beginnings that a model goes on with."""

    def begin(self) -> Tensor:
        """Return the hidden states (rows, dim_model) that predict the first new token of each row."""

    def go_on(self, ids: Tensor) -> Tensor:
        """Return those that predict the next, after the new tokens (rows,)."""


class Seq2SeqContinuation:
    """A decoder's input, the same for all rows, that goes on about the encoder's.

    Args:
        model: the model.
        source: (rows, length) ids of the encoder's input.
        length: (rows,) real tokens of it.
        start: (rows, tokens) ids that the decoder begins with.
        room: new tokens at most.
    """

    def __init__(self, model: Seq2Seq, source: Tensor, length: Tensor, start: Tensor, room: int) -> None:
        self._model = model
        self._source, self._length, self._start = source, length, start
        self._cache = model.new_cache(start.shape[1] + room)

    def begin(self) -> Tensor:
        """Run the encoder, and the decoder over its start."""
        return self._run(self._source, self._start)

    def go_on(self, ids: Tensor) -> Tensor:
        """Run the decoder over one more token; the cache holds what it needs of the encoder."""
        return self._run(None, ids.unsqueeze(1))

    def _run(self, source: Tensor | None, ids: Tensor) -> Tensor:
        output = self._model(source, self._length, ids, None, past_key_values=self._cache, return_logits=False)
        states: Tensor = output.last_hidden_state
        return states[:, -1]


class DecoderContinuation:
    """Texts of different lengths that a decoder goes on with; they are aligned at their ends.

    Args:
        model: the model, which takes `position_ids`.
        ids: (rows, length), padded on the right.
        length: (rows,) tokens to begin with.
        room: new tokens at most.
        last_position: none is beyond it; rows that have come so far may only be gone on with by what is not used.
    """

    def __init__(self, model: DecoderLM, ids: Tensor, length: Tensor, room: int, last_position: int) -> None:
        longest = int(length.max())
        self._model = model
        self._positions = torch.arange(longest, device=ids.device) - (longest - length.unsqueeze(1))
        self._mask = self._positions >= 0
        self._ids = ids.gather(1, self._positions.clamp(min=0))
        self._last_position = last_position
        self._cache = model.new_cache(longest + room)

    def begin(self) -> Tensor:
        """Run the model over the texts."""
        return self._run(self._ids)

    def go_on(self, ids: Tensor) -> Tensor:
        """Run it over one more token."""
        self._positions = self._positions[:, -1:] + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], dim=1)
        return self._run(ids.unsqueeze(1))

    def _run(self, ids: Tensor) -> Tensor:
        output = self._model(
            ids,
            attention_mask=self._mask.long(),
            position_ids=self._positions.clamp(0, self._last_position),
            past_key_values=self._cache,
            return_logits=False,
        )
        states: Tensor = output.last_hidden_state
        return states[:, -1]


@torch.no_grad()
def decode_greedily(model: BaseModel, continuation: Continuation, limits: Tensor, end_id: int) -> list[list[int]]:
    """Go on with each row until its end token or its limit. All processes must call it.

    Args:
        model: has the head that scores tokens.
        continuation: what to go on with.
        limits: (rows,) new tokens at most, at least 1.
        end_id: ends a row.

    Returns:
        The new ids of each row, without the end token.
    """
    tokens: list[Tensor] = []
    running = torch.ones_like(limits, dtype=torch.bool)
    states = continuation.begin()
    while True:
        ids = model.logits(states).argmax(dim=-1).where(running, end_id)
        tokens.append(ids)
        running = running & (ids != end_id) & (limits > len(tokens))
        # Sharded engines gather weights together, so that none may stop before all do.
        if not engine.distributed.all_reduce(running.any().int(), "max").item():
            break
        states = continuation.go_on(ids)
    rows = torch.stack(tokens, dim=1).tolist()
    return [row[: row.index(end_id)] if end_id in row else row for row in rows]
