"""`model-center convert`: from one layout to another, holding one tensor after the other."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from model_center.model.checkpoint import write_checkpoint

from .checkpoint_configuration import ConvertConfig, Layout
from .commands import OK, preparing, print_lines
from .stored_models import StoredModel, open_stored

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "chinese_vocab.model",
    "chat_template.jinja",
)
"""What tokenizers of all families consist of, here and in Transformers."""


class Cast(Mapping[str, Tensor]):
    """Tensors in another floating-point type, each made when it is asked for.

    Args:
        tensors: tensors by name.
        dtype: the type; None leaves them as they are.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        self._tensors, self._dtype = tensors, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.to(dtype=self._dtype) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Conversion:
    """A conversion that has been checked; nothing has been written yet."""

    source: StoredModel
    to: Layout
    output: Path
    config: Mapping[str, Any]
    """Content of the new `config.json`."""
    tensors: Mapping[str, Tensor]
    """The new tensors, each made when it is asked for."""
    tokenizer: tuple[Path, ...]
    """Files of the tokenizer, which are copied."""
    max_file_bytes: int

    def write(self) -> None:
        """Write the output, which appears complete or not at all.

        Raises:
            OSError: there is no room, or no permission.
            ValueError: a weight cannot be expressed there.
        """
        try:
            write_checkpoint(self.output, self.config, self.tensors, self.max_file_bytes, self.tokenizer)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"{self.output} could not be written, and nothing of it is left: {reason}") from error

    def summary(self) -> dict[str, object]:
        """What was done, in words, by topic."""
        weights = self.source.weights
        files = sorted(self.output.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        layout = f"Transformers' {self.config['model_type']}" if self.to == "transformers" else "ours"
        return {
            "from": f"{self.source.source.description} ({self.source.layout})",
            "to": f"{self.output} ({layout})",
            "weights": f"{len(self.tensors)} tensors in {', '.join(file.name for file in files)}, {size / 1e6:,.1f} MB",
            "without": f"{', '.join(weights.absent)}: not in the source" if weights.absent else None,
            "unused": ", ".join(weights.left_over),
            "tokenizer": ", ".join(file.name for file in self.tokenizer) or "none found",
        }


def run(config: ConvertConfig, console: Console) -> int:
    """Convert a checkpoint and print what was done."""
    with preparing(console, "Looking at the checkpoint"):
        conversion = prepare_conversion(config)
    with preparing(console, f"Writing {config.output}"):
        conversion.write()
    print_lines(console, {topic: text for topic, text in conversion.summary().items() if text})
    return OK


def prepare_conversion(config: ConvertConfig) -> Conversion:
    """Check everything that can be checked before weights are read.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is damaged, of no known family, or cannot be converted so; or the output exists.
    """
    output = Path(config.output).expanduser()
    if output.exists():
        raise ValueError(f"output must be a directory that does not exist yet, but {output} does")
    dtype: torch.dtype | None = None if config.dtype is None else getattr(torch, config.dtype)
    source = open_stored(config.source, config.family, {} if dtype is None else {"dtype": dtype})
    source.weights.problems.raise_if_any(source.source.description)
    to = config.to or ("transformers" if source.is_ours else "model_center")
    tensors: Mapping[str, Tensor] = Cast(source.weights, dtype)
    if to == "transformers":
        if source.is_foreign:
            raise ValueError(f"{source.source.description} is one of Transformers already; there is nothing to convert")
        written, tensors = source.model.exported(tensors)
    else:
        written = source.model.config.to_dict()
    files = (source.source.file(name) for name in TOKENIZER_FILES)
    tokenizer = tuple(file for file in files if file is not None)
    return Conversion(source, to, output, written, tensors, tokenizer, config.max_file_bytes)
