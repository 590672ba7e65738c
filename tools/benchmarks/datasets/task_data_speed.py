"""Time what happens between a task's files and the batches of an epoch (results: README.md beside this file).

How to run it is said there, too.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model_center.dataset import DistributedDataLoader
from model_center.dataset.bertdataset import DATASET
from model_center.tokenizer import BertTokenizer

BATCH_SIZE = 64


def report(what: str, action: Callable[[], Any], repeats: int) -> Any:
    """Do something several times and print the times it took; returns its last result."""
    wall, processor = [], []
    result = None
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        result = action()
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    print(f"| {what} | {statistics.median(wall):.2f} | {min(wall):.2f} | {statistics.median(processor):.2f} |")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--superglue", type=Path, required=True, help="folder that holds BoolQ/")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder of bert-base-uncased's vocab.txt")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    tokenizer = BertTokenizer.from_pretrained(arguments.vocabulary)

    def boolq(**options: Any) -> Any:
        return DATASET["BoolQ"](arguments.superglue, "train", 0, 1, tokenizer, **options)

    print("| what | median s | least s | processor s |\n| --- | --- | --- | --- |")
    dataset = report("read and tokenize, at most 512 tokens", boolq, arguments.repeats)
    report("the same, at most 128 tokens", lambda: boolq(max_encoder_length=128), arguments.repeats)
    with tempfile.TemporaryDirectory() as folder:
        boolq(cache=folder)
        report("from the cache", lambda: boolq(cache=folder), arguments.repeats)
    for bucketed in (False, True):
        loader = DistributedDataLoader(dataset, BATCH_SIZE, shuffle=True, device="cpu", bucket_by_length=bucketed)
        what = f"an epoch in batches of {BATCH_SIZE}" + (", rows of similar length together" if bucketed else "")
        batches = report(what, functools.partial(list, loader), arguments.repeats)
        padded = sum(batch["input_ids"].numel() for batch in batches)
        print(f"{padded:,} tokens with padding, {int(dataset.lengths.sum()):,} without")


if __name__ == "__main__":
    main()
