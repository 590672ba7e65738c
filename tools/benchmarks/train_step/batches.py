"""Synthetic data that a model can learn: in each row, ids grow by a stride of its own."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .workloads import MASKED, Workload

RESERVED = 16
"""Ids at the end of the vocabulary that do not occur in texts; the last one but one is the mask."""
STRIDES = 8
WORDS_OF_CURVES = 512
"""So few words that a model learns their frequencies within tens of steps."""


@dataclass(frozen=True)
class Batch:
    """Rows for one process.

    Attributes:
        ids: (batch, length), with 0 at padding.
        lengths: (batch,), number of real positions; None if there is no padding.
        decoder_ids: (batch, target_length) in an encoder-decoder.
        labels: what each position of the (last) stack has to predict, -100 for nothing.
        real: number of real tokens of each row.
    """

    ids: Tensor
    lengths: Tensor | None
    decoder_ids: Tensor | None
    labels: Tensor
    real: tuple[int, ...]
    targets: int

    def to(self, device: torch.device, *, labels: bool) -> "Batch":
        """The same on a device; where `labels` is false these stay on the CPU, which spares our losses a wait."""
        moved = [None if each is None else each.to(device) for each in (self.lengths, self.decoder_ids)]
        of_positions = self.labels.to(device) if labels else self.labels
        return Batch(self.ids.to(device), moved[0], moved[1], of_positions, self.real, self.targets)

    def ours(self, family: str) -> dict[str, Any]:
        """Arguments of our models."""
        batch, length = self.ids.shape
        lengths = torch.full((batch,), length, device=self.ids.device) if self.lengths is None else self.lengths
        if family == "cpm1":
            nothing = torch.zeros_like(self.ids)
            return {"input": self.ids, "length": lengths, "context": nothing, "span": nothing, "return_logits": False}
        if family == "cpm2":
            assert self.decoder_ids is not None
            whole = torch.full_like(lengths, self.decoder_ids.shape[1])
            inputs = {"enc_input": self.ids, "enc_length": lengths, "dec_input": self.decoder_ids, "dec_length": whole}
            return {**inputs, "return_logits": False}
        inputs = {"input_ids": self.ids}
        if self.lengths is not None:
            inputs["length"] = self.lengths
        if self.decoder_ids is not None:
            inputs["decoder_input_ids"] = self.decoder_ids
        return inputs

    def transformers(self, family: str) -> dict[str, Any]:
        """Arguments of Transformers' models."""
        inputs = {"input_ids": self.ids, "labels": self.labels}
        if family in ("gpt2", "gptj"):  # which shift labels themselves
            inputs["labels"] = self.labels.roll(1, 1)
        if self.decoder_ids is not None:
            inputs["decoder_input_ids"] = self.decoder_ids
        if self.lengths is not None:
            positions = torch.arange(self.ids.shape[1], device=self.ids.device)
            inputs["attention_mask"] = (positions < self.lengths[:, None]).long()
        return inputs


def make_batches(
    workload: Workload, vocab_size: int, count: int, seed: int, *, most_words: int | None = None
) -> list[Batch]:
    """Different batches of the same kind, on the CPU; of all words of the vocabulary, or the first of them."""
    words = min(vocab_size - RESERVED, most_words or vocab_size)
    seeds = range(1000 * seed, 1000 * seed + count)
    return [_make(workload, vocab_size, words, torch.Generator().manual_seed(each)) for each in seeds]


def _make(workload: Workload, vocab_size: int, words: int, generator: torch.Generator) -> Batch:
    batch, length = workload.batch, workload.length
    start = torch.randint(1, words, (batch, 1), generator=generator)
    stride = torch.randint(1, STRIDES, (batch, 1), generator=generator)
    ids = 1 + (start + stride * torch.arange(length + workload.target_length + 1)) % (words - 1)
    lengths = None
    real = torch.ones(batch, length, dtype=torch.bool)
    if workload.padding:
        shortest = max(2, round(length * (1 - 2 * workload.padding)))
        lengths = torch.randint(shortest, length + 1, (batch,), generator=generator)
        real = torch.arange(length) < lengths[:, None]
    decoder_ids, inputs = None, ids[:, :length].masked_fill(~real, 0)
    if workload.target_length:
        decoder_ids = ids[:, length:-1].contiguous()
        labels = ids[:, length + 1 :].contiguous()
    elif workload.family == "bert":
        hidden = real & (torch.rand(batch, length, generator=generator) < MASKED)
        labels = inputs.masked_fill(~hidden, -100)
        inputs = inputs.masked_fill(hidden, vocab_size - 2)
    else:
        labels = inputs.roll(-1, 1).masked_fill(~(real & real.roll(-1, 1)), -100)
        labels[:, -1] = -100
    return Batch(inputs, lengths, decoder_ids, labels, tuple(real.sum(1).tolist()), int((labels != -100).sum()))
