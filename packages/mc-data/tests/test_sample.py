"""The shipped sample is what its note says."""

import torch
from toy_tokenizer import ToyTokenizer

from model_center.dataset.bertdataset import DATASET
from model_center.dataset.samples import sample_path


def test_balanced_rows_without_shared_passages() -> None:
    passages = {}
    tokenizer = ToyTokenizer()
    note = (sample_path() / "BoolQ" / "README.md").read_text(encoding="utf-8")
    for split in ("train", "dev"):
        dataset = DATASET["BoolQ"](sample_path(), split, 0, 1, tokenizer)
        assert f"{len(dataset):,} {'training' if split == 'train' else split} rows" in note.replace("\n", " ")
        assert dataset.labels is not None
        assert torch.tensor(dataset.labels).bincount().tolist() == [len(dataset) // 2] * 2
        items = (dataset[index] for index in range(len(dataset)))
        passages[split] = {tuple(item["input_ids"][item["token_type_ids"] == 0].tolist()) for item in items}
    assert not passages["train"] & passages["dev"]
