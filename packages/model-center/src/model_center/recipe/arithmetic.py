"""Floating-point operations of training, and how many of them a device can do in a second."""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch

from model_center.layer.feedforward import GATED
from model_center.model.config import Config
from model_center.model.encoder_lm import EncoderLMConfig
from model_center.model.seq2seq import Seq2SeqConfig

from .configuration import require


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations of one training step."""

    model: int
    """Forward and backward: what the mathematics needs, whatever is computed twice to save memory."""
    recomputation: int
    """The forward of the blocks once more, where their activations are recomputed in backward; PyTorch saves a block's
    last product if there is no dropout behind it."""

    @property
    def hardware(self) -> int:
        """All that the device computes."""
        return self.model + self.recomputation


def training_flops(
    config: Config,
    lengths: Sequence[int],
    decoder_lengths: Sequence[int] = (),
    *,
    targets: int | None = None,
    recomputes_blocks: bool = False,
) -> TrainingFlops:
    """Count the operations of one training step: matrix products, a multiplication and an addition being two.

    Lookups, norms, activations and softmax are not counted, as is usual (Chowdhery et al. 2022, PaLM, appendix B);
    nor is the half of causal attention that kernels can leave out. Backward takes twice as many as forward.

    Args:
        config: configuration of the model.
        lengths: real tokens of each row, or of each document where several that don't see each other share a row; of
            the encoder in an encoder-decoder.
        decoder_lengths: in an encoder-decoder, the decoder's tokens for each of these.
        targets: positions whose vocabulary scores are computed; by default every token of the (last) stack.
        recomputes_blocks: whether the blocks' activations are recomputed in backward.

    Raises:
        ValueError: the decoder's lengths are missing or don't belong there.
    """
    two_stacks = isinstance(config, Seq2SeqConfig)
    expected = len(lengths) if two_stacks else 0
    require(len(decoder_lengths) == expected, "decoder_lengths", f"{expected} lengths", list(decoder_lengths))
    blocks = config.depths["encoder"] * _block(config, lengths)
    last = lengths
    if two_stacks:
        last = decoder_lengths
        blocks += config.depths["decoder"] * (
            _block(config, decoder_lengths) + _attention(config, decoder_lengths, lengths)
        )
    head = _head(config) * (sum(last) if targets is None else targets)
    return TrainingFlops(model=3 * (blocks + head), recomputation=blocks if recomputes_blocks else 0)


def _block(config: Config, lengths: Sequence[int]) -> int:
    """Operations of a block's forward, without cross-attention."""
    matrices = 3 if config.ffn_activate_fn.startswith(GATED) else 2
    feed_forward = 2 * sum(lengths) * matrices * config.dim_model * config.dim_ff
    return _attention(config, lengths, lengths) + feed_forward


def _attention(config: Config, queries: Sequence[int], keys: Sequence[int]) -> int:
    """Operations of an attention's forward: four projections, scores, and what they weight."""
    inner = config.num_heads * config.dim_head
    inner_kv = inner if config.num_heads_kv is None else config.num_heads_kv * config.dim_head
    projections = 4 * config.dim_model * (sum(queries) * inner + sum(keys) * inner_kv)
    pairs = sum(query * key for query, key in zip(queries, keys, strict=True))
    return projections + 4 * inner * pairs


def _head(config: Config) -> int:
    """Operations of the head's forward for one position."""
    if config.cls_head is not None:
        return 2 * config.dim_model * config.cls_head
    transform = config.dim_model if isinstance(config, EncoderLMConfig) else 0
    return 2 * config.dim_model * (transform + config.vocab_size)


@cache
def known_peaks() -> list[dict[str, str]]:
    """Return the rates of known GPUs in TFLOP/s from their datasheets, dense (not those with sparsity).

    The first `pattern` that a GPU's name contains as whole words counts; a rate is empty where there is no such unit.
    """
    table = files(__package__) / "gpu_peaks.csv"
    return list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Return how many operations a second a device can do in matrix products, or None where that is not known.

    Args:
        device: a device, or a GPU's name as CUDA gives it. CPUs are not known.
        dtype: type of the factors. With float32 the TF32 rate counts where PyTorch is told to use that.
    """
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    found = (peak for peak in known_peaks() if re.search(rf"(?<!\w)({peak['pattern']})(?!\w)", device))
    rates = next(found, {})
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" and rates.get("tf32"):
        name = "tf32"
    rate = rates.get(name)
    return float(rate) * 1e12 if rate else None
