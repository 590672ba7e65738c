"""Task data sets for CPM-2.

An item holds ``enc_input`` (the prompt with the sentinel ``<s_0>`` in its slot), ``enc_length``, ``dec_input`` (the
sentinel), ``dec_length``, ``targets`` (the class) and ``index`` (1 where the answer is predicted). Compare the logits
of the words in the data set's `verbalizer` at that position.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tasks.catalogue import LCQMC
from .tasks.dataset import Registry
from .tasks.seq2seq import Seq2SeqDataset

__all__ = ["DATASET", "CPM2Dataset"]


@dataclass(eq=False, repr=False)
class CPM2Dataset(Seq2SeqDataset):
    """A task as input for CPM-2 (see `Seq2SeqDataset`)."""

    family = "cpm2"
    sentinel = "<s_0>"

    @property
    def fill(self) -> int:
        """0: positions behind the lengths are never attended to."""
        return 0


DATASET = Registry(CPM2Dataset, (LCQMC,))
