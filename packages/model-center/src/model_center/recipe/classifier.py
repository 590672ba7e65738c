"""An encoder with a classifier on top, and the checkpoint directories that hold it with its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model_center import engine
from model_center.layer import Linear
from model_center.model import EncoderLM
from model_center.tokenizer import load_tokenizer

from .configuration import require, require_choice
from .finetune_configuration import Pooling
from .task_model import Batch, ClassModel, TaskHead, load_backbone, read_head

HEAD_CONFIG, HEAD_WEIGHTS = "classifier.json", "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class HeadConfig(TaskHead):
    """The classifier; kept in a checkpoint's `classifier.json`."""

    num_classes: int
    """Classes to choose from; in a multiple-choice task, the choices."""
    num_choices: int = 1
    """Encoded sequences a sample: above 1 in a multiple-choice task, where each gets one score."""
    pooling: Pooling
    """What is read of the encoder's output."""
    dropout: float
    """Share of the pooled vector's elements that are zeroed in training."""

    def __post_init__(self) -> None:
        require_choice("pooling", self.pooling, Pooling)
        require(self.num_choices in (1, self.num_classes), "num_choices", "1 or num_classes", self.num_choices)


class EncoderClassifier(ClassModel):
    """Reads one vector a sequence from an encoder and turns it into one score a class.

    Args:
        encoder: the encoder.
        head: the classifier's options.
    """

    head_file = HEAD_CONFIG

    def __init__(self, encoder: EncoderLM, head: HeadConfig) -> None:
        super().__init__(head)
        self.encoder = encoder
        self.head: HeadConfig
        self.dropout = torch.nn.Dropout(head.dropout)
        scores = head.num_classes // head.num_choices
        self.classifier = Linear(encoder.config.dim_model, scores, dtype=encoder.config.dtype, init_std=0.02, bias=True)

    @property
    def backbone(self) -> EncoderLM:
        """The encoder."""
        return self.encoder

    @property
    def answers_in(self) -> str:
        """The number of classes."""
        return f"{self.head.num_classes} classes"

    def forward(self, batch: Batch) -> torch.Tensor:
        """Return the logits (batch, num_classes) of a batch as the task data sets give it.

        Args:
            batch: `input_ids`, `attention_mask` and perhaps `token_type_ids`, each (batch, length); in a
                multiple-choice task each of them once a choice, with the choice's number behind the name.
        """
        suffixes = [""] if self.head.num_choices == 1 else [str(choice) for choice in range(self.head.num_choices)]
        scores = [self.classifier(self.dropout(self._pooled(batch, suffix))) for suffix in suffixes]
        return torch.cat(scores, dim=-1)

    def save(self, tokenizer: Any, directory: Path) -> None:
        """Write encoder, classifier and tokenizer into an empty directory; `Bert.from_pretrained` reads it as well.

        With several processes all must call it; the first one writes.
        """
        weights = engine.current_engine().state_dict(self.classifier)
        if engine.rank() == 0:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / HEAD_WEIGHTS)
        super().save(tokenizer, directory)

    def _pooled(self, batch: Batch, suffix: str) -> torch.Tensor:
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


def load_classifier(directory: Path | str, dtype: torch.dtype | None = None) -> tuple[EncoderClassifier, Any]:
    """Load what a run of an encoder has saved, as `load_task_model` loads that of any family."""
    directory = Path(directory)
    head = read_head(directory / HEAD_CONFIG, HeadConfig, "classifier")
    encoder = load_backbone(directory, dtype=dtype)
    if not isinstance(encoder, EncoderLM):
        raise ValueError(f"{directory} must hold an encoder such as BERT, but holds a {type(encoder).__name__}")
    model = EncoderClassifier(encoder, head)
    try:
        weights = load_file(directory / HEAD_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory / HEAD_WEIGHTS} cannot be read: {error}") from error
    engine.load_state_dict(model.classifier, weights)
    model.eval()
    return model, load_tokenizer(directory)
