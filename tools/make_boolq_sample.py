"""Select the BoolQ rows that mc-data ships (packages/mc-data/src/model_center/dataset/samples/BoolQ).

    .venv/bin/python tools/make_boolq_sample.py --superglue ../shared/data/superglue \
        --vocabulary ../shared/data/modelcenter_configs/bert/bert-base-uncased

Kept are rows whose question and passage fit 96 tokens of BERT's vocabulary, special tokens included, and of the larger
class a random choice as large as the smaller class, so that a model that has learnt nothing is right half the time.
Dev rows whose passage occurs in the training part are left out. The files come out alike, byte for byte, each time.
"""

import argparse
import gzip
import json
import random
from pathlib import Path
from typing import Any

from transformers import BertTokenizer

OUTPUT = Path(__file__).parents[1] / "packages/mc-data/src/model_center/dataset/samples/BoolQ"
MAX_TOKENS = 96
SEED = 0

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """The rows of a JSON lines file, with the fields that are shipped."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{name: row[name] for name in ("question", "passage", "label")} for row in rows]


def short(rows: list[Row], tokenizer: BertTokenizer) -> list[Row]:
    """The rows whose question and passage fit the limit."""
    encoded = tokenizer([row["passage"] for row in rows], [row["question"] for row in rows])["input_ids"]
    return [row for row, ids in zip(rows, encoded, strict=True) if len(ids) <= MAX_TOKENS]


def balanced(rows: list[Row]) -> list[Row]:
    """As many rows of each class, in their order."""
    classes = [[number for number, row in enumerate(rows) if row["label"] is label] for label in (False, True)]
    size = min(map(len, classes))
    chosen = {number for numbers in classes for number in random.Random(SEED).sample(numbers, size)}
    return [row for number, row in enumerate(rows) if number in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--superglue", type=Path, required=True, help="folder that holds BoolQ/")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder of bert-base-uncased's vocab.txt")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where train.jsonl.gz and val.jsonl.gz go")
    arguments = parser.parse_args()
    tokenizer = BertTokenizer.from_pretrained(str(arguments.vocabulary))
    rows = {split: read(arguments.superglue / "BoolQ" / f"{split}.jsonl") for split in ("train", "val")}
    rows["train"] = balanced(short(rows["train"], tokenizer))
    seen = {row["passage"] for row in rows["train"]}
    rows["val"] = balanced(short([row for row in rows["val"] if row["passage"] not in seen], tokenizer))
    for split, kept in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        file = arguments.output / f"{split}.jsonl.gz"
        file.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
        print(f"{file}: {len(kept)} rows, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
