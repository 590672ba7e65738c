"""A text goes to ids and back, with nothing but mc-tokenizers and what it needs installed."""

import sys
import tempfile
from pathlib import Path

from model_center.tokenizer import BertTokenizer

with tempfile.TemporaryDirectory() as folder:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "##ness", "morning"]
    (Path(folder) / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer.from_pretrained(folder)
ids = tokenizer.encode("Goodness morning")
assert ids == [2, 5, 6, 7, 3], ids
assert tokenizer.decode(ids[1:-1]) == "goodness morning", tokenizer.decode(ids[1:-1])
assert "torch" not in sys.modules
