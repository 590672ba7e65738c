"""An indexed corpus is written and read, with nothing but mc-data and numpy installed."""

import sys
import tempfile
from pathlib import Path

import numpy as np

from model_center import dataset
from model_center.dataset.indexed import MMapIndexedDataset, make_builder

with tempfile.TemporaryDirectory() as folder:
    builder = make_builder(str(Path(folder) / "corpus.bin"))
    rows = [np.array([1, 2, 3]), np.array([4, 5])]
    for row in rows:
        builder.add_item(row)
        builder.end_document()
    builder.finalize(str(Path(folder) / "corpus.idx"))
    corpus = MMapIndexedDataset(str(Path(folder) / "corpus"))
    assert len(corpus) == 2
    assert [corpus[number].tolist() for number in range(2)] == [row.tolist() for row in rows]
    del corpus
message = ""
try:
    _ = dataset.DistributedDataLoader
except ImportError as error:
    message = str(error)
assert "mc-data[torch]" in message, message
assert "torch" not in sys.modules
