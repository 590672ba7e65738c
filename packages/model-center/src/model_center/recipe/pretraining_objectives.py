"""What each model family learns from plain sequences of token ids, and the special tokens that this needs."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from model_center.dataset.indexed import CausalLM, ContextSpan, MaskedLM, PrefixLM, SpanCorruption
from model_center.dataset.indexed.objectives import Objective, Sample
from model_center.model.config import Config

from .pretrain_configuration import Objective as ObjectiveName
from .pretrain_configuration import ObjectiveOptions

OBJECTIVES: Mapping[str, tuple[ObjectiveName, ...]] = {
    "bert": ("masked",),
    "gpt2": ("causal", "prefix", "context"),
    "gptj": ("causal", "prefix", "context"),
    "cpm1": ("context", "prefix", "causal"),
    "t5": ("spans",),
    "cpm2": ("spans",),
}
"""Model type -> what it can be trained for; the first is what it was published with, and the default."""
BELONGS: Mapping[str, tuple[ObjectiveName, ...]] = {
    "max_target_length": ("spans",),
    "mask_share": ("masked", "spans"),
    "mean_span": ("spans",),
    "whole_words": ("masked",),
}
"""Option -> the only objectives that it means something to."""
MASK_SHARE, MEAN_SPAN = 0.15, 3.0
"""Defaults of Devlin et al. (2019) and Raffel et al. (2020)."""


@dataclass(frozen=True)
class PretrainingObjective:
    """An objective with the special tokens of its family, and the lengths of its samples.

    Attributes:
        model_type: The model's family.
        options: What was chosen, with all that was left open filled in.
        inner: Makes a sample of the ids between `begin` and `end`, both included.
        begin: Ids put before each sequence (`[CLS]`).
        end: Ids put behind it (`[SEP]`).
        closing_id: An id that is taken off when it ends a sequence, because the sample gets an end of its own.
        room: Sequences are cut to so many tokens.
        lengths: What a sequence of so many tokens has on each side of its sample.
        vocab_size: Every id of the corpus is smaller.
        takes_positions: Whether the model takes `position_ids`.
        tokenizer: Fingerprint of the tokenizer that the ids belong to.
    """

    model_type: str
    options: ObjectiveOptions
    inner: Objective
    lengths: Callable[[int], tuple[int, ...]]
    vocab_size: int
    takes_positions: bool
    tokenizer: str
    room: int
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    closing_id: int | None = None

    @property
    def sides(self) -> tuple[int, ...]:
        """Tokens of a full row on each side: of the one stack, or of encoder and decoder."""
        lengths = (self.options.max_length, self.options.max_target_length)
        return tuple(length for length in lengths if length is not None)

    @property
    def fingerprint(self) -> str:
        """Two objectives with the same one make the same samples of the same sequences."""
        made_by = (type(self.inner).__qualname__, self.options, self.tokenizer)
        identity = (made_by, self.begin, self.end, self.closing_id, self.room, self.vocab_size)
        return hashlib.sha256(repr(identity).encode()).hexdigest()

    def cut(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return what of a sequence, of shape (tokens,), goes into its sample."""
        if self.closing_id is not None and len(tokens) and tokens[-1] == self.closing_id:
            tokens = tokens[:-1]
        return tokens[: self.room]

    def __call__(self, tokens: npt.NDArray[np.int64], random: np.random.Generator) -> Sample:
        """Return the sample of what `cut` left of a sequence."""
        if self.begin:
            tokens = np.concatenate([self.begin, tokens, self.end])
        return self.inner(tokens, random)


def make_objective(config: Config, tokenizer: Any, options: ObjectiveOptions | None = None) -> PretrainingObjective:
    """Return what a model is to learn.

    Args:
        config: The model's configuration.
        tokenizer: The model's tokenizer.
        options: What is not as by default.

    Raises:
        ValueError: The model has no such objective, the tokenizer lacks a token that it needs, or a length or the
            vocabulary does not fit the model.
    """
    options = options or ObjectiveOptions()
    known = _objectives_of(config)
    name = options.objective or known[0]
    if name not in known:
        raise ValueError(f"data.objective of a {config.model_type} must be one of {', '.join(known)}, but is {name!r}")
    for option, objectives in BELONGS.items():
        if getattr(options, option) and name not in objectives:
            raise ValueError(f"data.{option} belongs to the objective {' or '.join(objectives)}, but that is {name}")
    if tokenizer.vocab_size + config.padding_ids > config.vocab_size:
        padding = f" and {config.padding_ids} for padding" * bool(config.padding_ids)
        raise ValueError(
            f"`vocab_size` of the model must be at least that of the tokenizer {tokenizer.name} "
            f"({tokenizer.vocab_size}){padding}, but is {config.vocab_size}"
        )
    position_size: int | None = getattr(config, "position_size", None)
    if position_size is not None and options.max_length > position_size:
        raise ValueError(
            f"data.max_length must be at most the model's position_size ({position_size}), but is {options.max_length}"
        )
    return PretrainingObjective(
        model_type=config.model_type,
        takes_positions=position_size is not None or config.pos_bias_type == "rotary",
        tokenizer=tokenizer.fingerprint,
        **_MAKERS.get(name, _left_to_right)(config, tokenizer, replace(options, objective=name)),
    )


def _objectives_of(config: Config) -> tuple[ObjectiveName, ...]:
    if config.model_type not in OBJECTIVES:
        raise ValueError(f"there is no objective for the model type {config.model_type!r}, only for {list(OBJECTIVES)}")
    return ("causal",) if getattr(config, "is_decoder", False) else OBJECTIVES[config.model_type]


def _left_to_right(config: Config, tokenizer: Any, options: ObjectiveOptions) -> dict[str, Any]:
    inner: Objective
    if options.objective == "context":
        inner = ContextSpan(tokenizer.eod_id)
    else:
        inner = PrefixLM() if options.objective == "prefix" else CausalLM()
    return {
        "inner": inner,
        "lengths": _unchanged,
        "options": options,
        "room": options.max_length,
        "vocab_size": config.vocab_size - config.padding_ids,
    }


def _masked_lm(config: Config, tokenizer: Any, options: ObjectiveOptions) -> dict[str, Any]:
    vocabulary = tokenizer.get_vocab()
    begin, end, mask = _ids(tokenizer, vocabulary, "[CLS]", "[SEP]", "[MASK]")
    # Ids that the model has, but the tokenizer does not, stand for nothing: no replacement is one.
    vocab_size = min(len(tokenizer), config.vocab_size)
    continuations = None
    if options.whole_words:
        continuations = np.zeros(vocab_size, dtype=bool)
        continuations[[index for token, index in vocabulary.items() if token.startswith("##")]] = True
        if not continuations.any():
            raise ValueError(f"data.whole_words needs a WordPiece vocabulary, but {tokenizer.name} has no token `##…`")
    share = options.mask_share or MASK_SHARE
    inner = MaskedLM(vocab_size, mask, (begin, end), share, continuations)
    return {
        "inner": inner,
        "lengths": _framed,
        "options": replace(options, mask_share=share),
        "room": options.max_length - 2,
        "begin": (begin,),
        "end": (end,),
        "closing_id": end,
        "vocab_size": vocab_size,
    }


def _span_corruption(config: Config, tokenizer: Any, options: ObjectiveOptions) -> dict[str, Any]:
    if config.model_type == "cpm2":
        sentinels, start = list(tokenizer.sentinel_list), tokenizer.sod_id
    else:
        vocabulary = tokenizer.get_vocab()
        names = [f"<extra_id_{number}>" for number in range(100)]
        sentinels = [vocabulary[name] for name in names if name in vocabulary]
        start = tokenizer.pad_id
    if not sentinels:
        raise ValueError(f"the objective spans needs a tokenizer with sentinels, but {tokenizer.name} has none")
    share, mean_span = options.mask_share or MASK_SHARE, options.mean_span or MEAN_SPAN
    inner = SpanCorruption(tuple(sentinels), tokenizer.eod_id, start, share, mean_span)
    limits = (options.max_length, options.max_target_length or 2 * options.max_length)
    # As many tokens as fit after corruption, which is more than `max_length` (Raffel et al., 2020).
    room = 0
    while all(length <= limit for length, limit in zip(inner.lengths(room + 1), limits, strict=True)):
        room += 1
    target = options.max_target_length or max(inner.lengths(length)[1] for length in range(room + 1))
    options = replace(options, max_target_length=target, mask_share=share, mean_span=mean_span)
    return {
        "inner": inner,
        "lengths": inner.lengths,
        "options": options,
        "room": room,
        "closing_id": tokenizer.eod_id,
        "vocab_size": config.vocab_size - config.padding_ids,
    }


_MAKERS: Mapping[str, Callable[[Config, Any, ObjectiveOptions], dict[str, Any]]] = {
    "masked": _masked_lm,
    "spans": _span_corruption,
}


def _ids(tokenizer: Any, vocabulary: Mapping[str, int], *tokens: str) -> list[int]:
    if missing := [token for token in tokens if token not in vocabulary]:
        raise ValueError(
            f"the objective masked needs a tokenizer with {', '.join(tokens)}, but {tokenizer.name} lacks {missing}"
        )
    return [vocabulary[token] for token in tokens]


def _unchanged(length: int) -> tuple[int, ...]:
    return (length,)


def _framed(length: int) -> tuple[int, ...]:
    return (length + 2,)
