"""A text becomes an indexed corpus, with nothing but mc-preprocess and what it needs installed."""

import subprocess
import sys
import tempfile
from pathlib import Path

from model_center.tools import indexed_dataset

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "vocab").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "morning"]
    (folder / "vocab" / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "text.txt").write_text("good morning\nmorning morning good\n")
    command = [str(Path(sys.executable).parent / "mc-preprocess"), "tokenize", "--input", str(folder / "text.txt")]
    options = ["--output", str(folder / "corpus"), "--tokenizer", str(folder / "vocab"), "--layout", "single"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (index,) = folder.glob("corpus*.idx")
    corpus = indexed_dataset.MMapIndexedDataset(str(index.with_suffix("")))
    assert corpus[0].tolist()[:2] == [5, 6], corpus[0]
    assert corpus[1].tolist()[:3] == [6, 6, 5], corpus[1]
    del corpus
assert "torch" not in sys.modules
