"""Checkpoints that are looked at without being loaded: which family, whose layout, what is in them."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from model_center.engine import TorchEngine, use_engine
from model_center.model import BaseModel, families
from model_center.model.base import Stored
from model_center.model.checkpoint import Checkpoint
from model_center.model.families import find_source
from model_center.model.source import Source, read_config
from model_center.model.transfer import Imported

from .configuration import require

META = torch.device("meta")


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint, none of whose tensors has been read.

    Attributes:
        source: Where its files are.
        config_path: Its `config.json`.
        options: The content of that.
        is_foreign: Whether it is one of Transformers.
        is_legacy: Whether it is one of ModelCenter 0.1 to 1.0.
        model: Its model, of shapes only.
        checkpoint: Its tensors by their own names.
        weights: Its tensors by our names, and what is wrong with them.
    """

    source: Source
    config_path: Path
    options: Mapping[str, Any]
    is_foreign: bool
    is_legacy: bool
    model: BaseModel
    checkpoint: Checkpoint
    weights: Imported

    @property
    def is_ours(self) -> bool:
        """Whether it is one of ours in today's form."""
        return not self.is_foreign and not self.is_legacy

    @property
    def layout(self) -> str:
        """Whose it is, in words."""
        if self.is_foreign:
            return f"Transformers' {self.model.config.model_type}"
        return f"{type(self.model).__name__} of {'ModelCenter 0.1 to 1.0' if self.is_legacy else 'ours'}"


@contextmanager
def absent_heads_unsaid() -> Iterator[None]:
    """Load checkpoints without a word about heads that they lack: for callers that need none, or tell of them."""
    package_logger = logging.getLogger("model_center.model")
    level = package_logger.level
    package_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package_logger.setLevel(level)


def open_stored(
    name_or_dir: str, family: str | None = None, changes: Mapping[str, Any] = MappingProxyType({})
) -> StoredModel:
    """Look at a checkpoint.

    Args:
        name_or_dir: A directory, or an identifier as `from_pretrained` takes it.
        family: Its model type, for directories that do not name it.
        changes: Options that take the place of the configuration's.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it has no configuration or no weights.
        ValueError: It is of no family that is known here, or its files are damaged.
    """
    source = find_source(name_or_dir)
    raw, path = read_config(source)
    stated = raw.get("model_type")
    if stated is None and family is None:
        raise ValueError(
            f"{path} names no `model_type`, so it is neither one of ours nor of Transformers; if it is one of "
            f"ModelCenter 0.1 to 1.0, say of which family (--family), {', '.join(families)}"
        )
    require(stated is None or family in (None, stated), "family", f"that of {path}, {stated!r}", family)
    model_type = family or stated
    if model_type not in families:
        raise ValueError(f"{path}: the family must be one of {', '.join(families)}, but is {model_type!r}")
    model_class = families[model_type]
    config = replace(model_class.config_class.from_raw(raw, path), **changes)
    stored = Stored(Checkpoint(source), raw)
    with use_engine(TorchEngine(META, use_checkpoint=False)):
        model = model_class(model_class.fit(config, stored))
        weights = model.import_of(stored).plan()
    is_legacy = not stored.is_foreign and "format_version" not in raw
    return StoredModel(source, path, raw, stored.is_foreign, is_legacy, model, stored.weights, weights)
