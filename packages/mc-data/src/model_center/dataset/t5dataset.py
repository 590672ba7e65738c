"""Task data sets for T5.

An item holds ``enc_input`` (the prompt with the sentinel ``<extra_id_0>`` in its slot), ``enc_length``, ``dec_input``
(the padding token that starts a decoder, and the sentinel), ``dec_length``, ``targets`` (the class) and ``index`` (1
where the answer is predicted). Compare the logits of the words in the data set's `verbalizer` at that position.

Where the answer is free text (ReCoRD, SQuAD), ``dec_input`` goes on with it, ``targets`` holds the token that follows
at each position that ``index`` marks (and -100 elsewhere), and the last one is the end of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tasks.catalogue import BOOLQ, CB, COPA, MULTIRC, RECORD, RTE, SQUAD, WIC, WSC
from .tasks.dataset import Registry
from .tasks.encoding import token_id
from .tasks.seq2seq import Seq2SeqDataset

__all__ = ["DATASET", "T5Dataset"]


@dataclass(eq=False, repr=False)
class T5Dataset(Seq2SeqDataset):
    """A task as input for T5 (see `Seq2SeqDataset`)."""

    family = "t5"
    sentinel = "<extra_id_0>"

    @property
    def fill(self) -> int:
        """Id of the padding token."""
        return token_id(self.tokenizer, "pad_token_id", "pad_id")

    def encoder_end(self) -> list[int]:
        """The end of the sequence."""
        return [token_id(self.tokenizer, "eos_token_id", "eod_id")]

    def decoder_start(self) -> list[int]:
        """The padding token, which starts T5's decoder."""
        return [self.fill]


DATASET = Registry(T5Dataset, (BOOLQ, CB, COPA, RTE, WIC, WSC, MULTIRC, RECORD, SQUAD))
