"""Task data sets for GPT-J: items as those of `gpt2dataset`, made with GPT-J's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from .gpt2dataset import GPT2Dataset
from .tasks.catalogue import BOOLQ, CB, COPA, MULTIRC, RECORD, RTE, WIC, WSC
from .tasks.dataset import Registry

__all__ = ["DATASET", "GPTjDataset"]


@dataclass(eq=False, repr=False)
class GPTjDataset(GPT2Dataset):
    """A task as input for GPT-J (see `GPT2Dataset`)."""

    family = "gptj"


DATASET = Registry(GPTjDataset, (BOOLQ, CB, COPA, RTE, WIC, WSC, MULTIRC, RECORD))
