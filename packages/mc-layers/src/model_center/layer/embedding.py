"""The token embedding, which also projects hidden states back onto the vocabulary."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model_center.engine import HALF
from model_center.layer.checks import check_last_dim, check_positive
from model_center.layer.weight_matrix import WeightMatrix


class Embedding(WeightMatrix):
    """Look up one row of a matrix for every index.

    The documentation of ModelCenter 0.1 breaks off after `vocab_size`; the other arguments are those of its models.

    Args:
        vocab_size: Number of rows; indices lie in [0, vocab_size).
        embedding_size: Length of a row.
        dtype: Type of the matrix.
        init_mean: Mean of the normal distribution that `weight`, of shape (vocab_size, embedding_size), starts from.
        init_std: Its standard deviation.
        length_scale: Divide the input of `projection` by the square root of `embedding_size`. The lookup is not scaled.
        int8: Store the matrix in 8 bits with one scale per row (see `WeightMatrix`).
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        *,
        dtype: torch.dtype = HALF,
        init_mean: float = 0.0,
        init_std: float = 1.0,
        length_scale: bool = False,
        int8: bool = False,
    ) -> None:
        check_positive(vocab_size=vocab_size, embedding_size=embedding_size)
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.length_scale = length_scale
        self.make_weight(vocab_size, embedding_size, dtype=dtype, int8=int8, mean=init_mean, std=init_std)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up `ids`, integers of shape (batch, seq_len) or any other, into (…, embedding_size).

        Raises:
            ValueError: An index outside the vocabulary. Checked on the CPU only, because the check would make a GPU
                wait; there CUDA reports a device-side assertion, and running the batch on the CPU names the index.
        """
        self._check_ids(ids)
        return self.rows(ids)

    def projection(self, x: Tensor) -> Tensor:
        """Score hidden states against every row: (batch, seq_len, embedding_size) to (batch, seq_len, vocab_size)."""
        check_last_dim("x", x, "embedding_size", self.embedding_size)
        if self.length_scale:
            x = x / math.sqrt(self.embedding_size)
        return F.linear(x, self.float_weight())

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`ids` must be a tensor of int64 or int32, but is {ids.dtype}")
        if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
            return
        outside = (ids < 0) | (ids >= self.vocab_size)
        if outside.any():
            index = tuple(outside.nonzero()[0].tolist())
            raise ValueError(
                f"`ids` must lie in [0, {self.vocab_size}), the vocabulary, "
                f"but {int(outside.sum())} of them do not; the first is ids{list(index)} = {int(ids[index])}"
            )
