"""The loader deals out the rows of a task's file, with mc-data[torch] installed."""

import json
import tempfile
from pathlib import Path

from model_center.dataset import DistributedDataLoader
from model_center.dataset.bertdataset import DATASET


class Words:
    """The least that a task's data set asks of BERT's tokenizer."""

    def __call__(self, *texts: str, **_: object) -> dict[str, list[int]]:
        ids = [len(word) for text in texts for word in text.split()]
        return {"input_ids": ids, "token_type_ids": [0] * len(ids), "attention_mask": [1] * len(ids)}

    def encode(self, text: str, **_: object) -> list[int]:
        return [len(word) for word in text.split()]


with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "BoolQ").mkdir()
    rows = [{"question": "is it", "passage": f"it is {'x' * n}", "label": n % 2 == 0, "idx": n} for n in range(6)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("train", "val", "test"):
        (Path(folder) / "BoolQ" / f"{split}.jsonl").write_text(text)
    data = DATASET["BoolQ"](folder, "train", 0, 1, Words(), 16)
    labels = [int(label) for batch in DistributedDataLoader(data, batch_size=2) for label in batch["labels"]]
assert sorted(labels) == [0, 0, 0, 1, 1, 1], labels
