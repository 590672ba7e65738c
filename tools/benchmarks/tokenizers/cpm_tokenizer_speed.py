"""How fast CPM's tokenizers are, next to the original's way and in several processes, with equal ids.

    python tools/benchmarks/tokenizers/cpm_tokenizer_speed.py --vocabulary VOCAB --processes 1 2 FILES...

The peer is the original's way, written plainly: `jieba.cut` in its default mode, then for each word the longest match
in the vocabulary, tried from the word's end.
"""

import argparse
import logging
import multiprocessing
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import jieba

from model_center.tokenizer import CPM1Tokenizer, Tokenizer, load_tokenizer
from model_center.tokenizer.word_cut import cut


class OriginalWay:
    """`jieba.cut`, and the longest match for each word."""

    def __init__(self, tokenizer: CPM1Tokenizer) -> None:
        self.ids = {**tokenizer.get_vocab(), " ": tokenizer.space_id, "\n": tokenizer.line_id}
        self.unknown = tokenizer.unk_id

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in jieba.cut(text):
            start = 0
            while start < len(word):
                end = len(word)
                while end > start and word[start:end] not in self.ids:
                    end -= 1
                if end == start:
                    ids.append(self.unknown)
                    start += 1
                else:
                    ids.append(self.ids[word[start:end]])
                    start = end
        return ids


def timed(function: Callable[[str], list[int]], lines: list[str]) -> tuple[float, list[list[int]]]:
    """Seconds of CPU time, which other processes lengthen less than wall time, and the ids."""
    start = time.process_time()
    ids = [function(line) for line in lines]
    return time.process_time() - start, ids


def compare(vocabulary: Path, files: list[Path], repeats: int) -> bool:
    """Print the speeds in one process, and say whether all ids were equal."""
    equal = True
    print("| text | million characters | original's way, µs/character | ours | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for file in files:
        lines = file.read_text(encoding="utf-8").splitlines()
        size = sum(map(len, lines))
        peer_best = our_best = float("inf")
        for _ in range(repeats):
            # A new tokenizer remembers no words of the last round.
            tokenizer = load_tokenizer(vocabulary)
            assert isinstance(tokenizer, CPM1Tokenizer)
            peer_seconds, peer_ids = timed(OriginalWay(tokenizer).encode, lines)
            our_seconds, our_ids = timed(tokenizer.encode, lines)
            peer_best, our_best = min(peer_best, peer_seconds), min(our_best, our_seconds)
            equal &= our_ids == peer_ids
        row = [file.name, f"{size / 1e6:.2f}", f"{peer_best / size * 1e6:.2f}", f"{our_best / size * 1e6:.2f}"]
        print(f"| {' | '.join(row)} | {peer_best / our_best:.1f} |", flush=True)
    print("Ids are equal." if equal else "IDS DIFFER.")
    return equal


class Worker:
    """What a process of the pool keeps: its tokenizer."""

    tokenizer: Tokenizer

    @classmethod
    def start(cls, vocabulary: Path) -> None:
        cls.tokenizer = load_tokenizer(vocabulary)
        cls.tokenizer.encode("预热")

    @classmethod
    def encode(cls, lines: list[str]) -> tuple[float, list[bytes]]:
        """Seconds of CPU time, and the ids."""
        start = time.process_time()
        ids = [array("H", cls.tokenizer.encode(line)).tobytes() for line in lines]
        return time.process_time() - start, ids


def scale(vocabulary: Path, files: list[Path], counts: list[int], repeats: int) -> None:
    """Print the speeds in several processes, each with its own dictionary."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    size = sum(map(len, lines))
    pieces = [lines[start : start + 500] for start in range(0, len(lines), 500)]
    context = multiprocessing.get_context("spawn")
    print("\n| processes | million characters/s | times the first | CPU time of all workers, s | of the parent |")
    print("| --- | --- | --- | --- | --- |")
    first = 0.0
    for count in counts:
        rounds = []
        for _ in range(repeats):
            with context.Pool(count, initializer=Worker.start, initargs=(vocabulary,)) as pool:
                pool.map(Worker.encode, [["一"]] * count * 4, chunksize=1)
                start, own_start = time.perf_counter(), time.process_time()
                workers = sum(seconds for seconds, _ in pool.imap(Worker.encode, pieces))
                rounds.append((time.perf_counter() - start, workers, time.process_time() - own_start))
        wall, workers, own = min(rounds)
        first = first or wall
        print(f"| {count} | {size / wall / 1e6:.2f} | {first / wall:.2f} | {workers:.2f} | {own:.2f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure CPM's tokenizers next to the original's way.")
    parser.add_argument("files", nargs="+", type=Path, help="text files, one text a line")
    parser.add_argument("--vocabulary", type=Path, required=True, help="CPM-1's vocab.txt")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many rounds counts")
    options = parser.parse_args()
    jieba.setLogLevel(logging.WARNING)
    start = time.process_time()
    jieba.initialize()
    loaded = time.process_time()
    cut("我")
    print(f"Loading the dictionary: jieba {loaded - start:.2f} s, ours {time.process_time() - loaded:.2f} s\n")
    equal = compare(options.vocabulary, options.files, options.repeats)
    if options.processes:
        scale(options.vocabulary, options.files, options.processes, options.repeats)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
