"""An encoder with a classifier on top, and the checkpoint directories that hold it with its tokenizer."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model_center import engine
from model_center.layer import Linear
from model_center.model import families, load_model
from model_center.model.encoder_lm import EncoderLM
from model_center.tokenizer import load_tokenizer

from .configuration import require, require_choice
from .finetune_configuration import Pooling

FORMAT_VERSION = 1
HEAD_CONFIG, HEAD_WEIGHTS = "classifier.json", "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The classifier, and the task it was made for; kept in a checkpoint's `classifier.json`."""

    task: str
    """Name of the task, or the file of its definition."""
    num_classes: int
    """Classes to choose from; in a multiple-choice task, the choices."""
    num_choices: int = 1
    """Encoded sequences a sample: above 1 in a multiple-choice task, where each gets one score."""
    max_length: int
    """Longest encoded sequence in training, in tokens."""
    pooling: Pooling
    """What is read of the encoder's output."""
    dropout: float
    """Share of the pooled vector's elements that are zeroed in training."""

    def __post_init__(self) -> None:
        require_choice("pooling", self.pooling, Pooling)
        require(self.num_choices in (1, self.num_classes), "num_choices", "1 or num_classes", self.num_choices)


class EncoderClassifier(torch.nn.Module):
    """Reads one vector a sequence from an encoder and turns it into one score a class.

    Args:
        encoder: the encoder.
        head: the classifier's options.
    """

    def __init__(self, encoder: EncoderLM, head: HeadConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.dropout = torch.nn.Dropout(head.dropout)
        scores = head.num_classes // head.num_choices
        self.classifier = Linear(encoder.config.dim_model, scores, dtype=encoder.config.dtype, init_std=0.02, bias=True)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the logits (batch, num_classes) of a batch as the task data sets give it.

        Args:
            batch: `input_ids`, `attention_mask` and perhaps `token_type_ids`, each (batch, length); in a
                multiple-choice task each of them once a choice, with the choice's number behind the name.
        """
        suffixes = [""] if self.head.num_choices == 1 else [str(choice) for choice in range(self.head.num_choices)]
        scores = [self.classifier(self.dropout(self._pooled(batch, suffix))) for suffix in suffixes]
        return torch.cat(scores, dim=-1)

    def _pooled(self, batch: Mapping[str, torch.Tensor], suffix: str) -> torch.Tensor:
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch[name + suffix] for name in names if name + suffix in batch}
        output = self.encoder(**inputs)
        if self.head.pooling == "pooler":
            pooled: torch.Tensor = output.pooler_output
        elif self.head.pooling == "cls":
            pooled = output.last_hidden_state[:, 0]
        else:
            # In float32, since a sum over hundreds of tokens loses digits in half precision.
            real = inputs["attention_mask"].unsqueeze(-1).float()
            mean = (output.last_hidden_state.float() * real).sum(dim=1) / real.sum(dim=1)
            pooled = mean.to(output.last_hidden_state.dtype)
        return pooled


def load_encoder(name: str | Path, *, dtype: torch.dtype | None = None, family: str | None = None) -> EncoderLM:
    """Load the encoder of a checkpoint, whatever heads it has.

    Args:
        name: directory or identifier, as for `Bert.from_pretrained`.
        dtype: type of the weights, if not that of the checkpoint's configuration.
        family: family of a checkpoint that does not name its own.

    Raises:
        ValueError, OSError: there is no such checkpoint, it is damaged, or it is not an encoder.
    """
    require(family is None or family in families, "model.family", f"one of {', '.join(families)}", family)
    package_logger = logging.getLogger("model_center.model")
    level = package_logger.level
    # The classifier takes the place of heads, so nobody needs to hear which of them the checkpoint lacks.
    package_logger.setLevel(logging.ERROR)
    try:
        load = load_model if family is None else families[family].from_pretrained
        encoder = load(name, dtype=dtype)
    finally:
        package_logger.setLevel(level)
    if not isinstance(encoder, EncoderLM):
        raise ValueError(f"model {str(name)!r} must be an encoder such as BERT, but is a {type(encoder).__name__}")
    return encoder


def save_classifier(model: EncoderClassifier, tokenizer: Any, directory: Path) -> None:
    """Write encoder, classifier and tokenizer into an empty directory; `Bert.from_pretrained` reads it as well.

    With several processes all must call it; the first one writes.
    """
    model.encoder.save_pretrained(directory)
    weights = engine.current_engine().state_dict(model.classifier)
    if engine.rank() == 0:
        tokenizer.save_pretrained(directory)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / HEAD_WEIGHTS)
        head = {"format_version": FORMAT_VERSION} | asdict(model.head)
        (directory / HEAD_CONFIG).write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")


def load_classifier(directory: Path | str, dtype: torch.dtype | None = None) -> tuple[EncoderClassifier, Any]:
    """Load what `save_classifier` wrote, e.g. a run's `checkpoints/best`.

    Args:
        directory: the checkpoint.
        dtype: type of the weights, if not the one they were trained in.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ValueError: the directory holds no such checkpoint, a damaged one, or one of a newer format.
    """
    directory = Path(directory)
    head = _read_head(directory / HEAD_CONFIG)
    model = EncoderClassifier(load_encoder(directory, dtype=dtype), head)
    try:
        weights = load_file(directory / HEAD_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory / HEAD_WEIGHTS} cannot be read: {error}") from error
    engine.load_state_dict(model.classifier, weights)
    model.eval()
    return model, load_tokenizer(directory)


def _read_head(file: Path) -> HeadConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values.pop("format_version")
        if version > FORMAT_VERSION:
            raise ValueError(f"it has format version {version}; this version reads up to {FORMAT_VERSION}")
        return HeadConfig(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.parent} holds no classifier: {file.name} cannot be read ({error})") from error
