"""From text to data set, beside the tokenizer library alone, and beside the original's way for CPM.

    python tools/benchmarks/indexed/end_to_end.py --corpora ../shared/data/corpora \
        --configs ../shared/data/modelcenter_configs --megabytes 100

English text goes through GPT-2's BPE and BERT's WordPiece, Chinese text through CPM-1's tokenizer. The library alone is
`encode_batch_fast` with as many threads as we have processes, on lines that are in memory, its ids thrown away. The
original's way is written here: `Pool.imap_unordered` over lines, jieba and longest match in Python, and one write per
piece.
"""

import argparse
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jieba
import numpy as np

from model_center.dataset.indexed import MMapIndexedDataset
from model_center.tokenizer import load_tokenizer
from model_center.tools import CausalLMEncoder, CPM1Encoder, LocalExecutor, tokenize_files


class OriginalEncoder:
    """Tokenizes as the original did: jieba's words, each cut from the left into the longest known pieces."""

    def __init__(self, vocabulary: Path) -> None:
        self.ids = {token: number for number, token in enumerate(vocabulary.read_text().splitlines())}

    def initializer(self) -> None:
        jieba.initialize()

    def encode(self, line: str) -> list[list[int]]:
        text = line.strip().replace("<n>", "\n")
        ids = []
        for word in jieba.cut(text, cut_all=False):
            word = word.replace(" ", "</_>").replace("\n", "</n>")
            ids += [self.ids[word]] if word in self.ids else self.pieces(word)
        ids.append(self.ids["<eod>"])
        pieces = [ids[start : start + 512] for start in range(0, len(ids), 512)]
        return [piece for piece in pieces if len(piece) >= 32]

    def pieces(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            end = len(word)
            while end > start and word[start:end] not in self.ids:
                end -= 1
            found.append(self.ids.get(word[start:end], self.ids["<unk>"]))
            start = max(end, start + 1)
        return found


def original_way(text: Path, target: Path, vocabulary: Path, workers: int) -> None:
    encoder = OriginalEncoder(vocabulary)
    sizes = []
    pool = multiprocessing.Pool(workers, initializer=encoder.initializer)
    with pool, text.open() as lines, target.open("wb") as data:
        for piece in itertools.chain.from_iterable(pool.imap_unordered(encoder.encode, lines, 10)):
            array = np.array(piece, dtype=np.uint16)
            data.write(array.tobytes())
            sizes.append(array.size)


def our_way(text: Path, target: Path, encoder: CausalLMEncoder, workers: int) -> None:
    tokenize_files([text], target, encoder, executor=LocalExecutor(workers), overwrite=True)


def repeated(sources: list[Path], target: Path, size: int) -> Path:
    """Write the sources over and over, up to a size."""
    content = b"".join(source.read_bytes().rstrip(b"\n") + b"\n" for source in sources)
    with target.open("wb") as stream:
        for _ in range(max(1, round(size / len(content)))):
            stream.write(content)
    return target


def rate(text: Path, case: Callable[[], object]) -> float:
    start = time.perf_counter()
    case()
    return text.stat().st_size / (time.perf_counter() - start) / 1e6


def library_alone(lines: list[str], tokenizer: Path) -> None:
    backend = load_tokenizer(tokenizer).backend_tokenizer  # type: ignore[attr-defined]  # a fast tokenizer
    for start in range(0, len(lines), 20_000):
        backend.encode_batch_fast(lines[start : start + 20_000], add_special_tokens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the way from text to data set.")
    parser.add_argument("--corpora", type=Path, required=True, help="folder with en/*.txt and zh/*.txt")
    parser.add_argument("--configs", type=Path, required=True, help="folder with gpt2/, bert/ and cpm1/ vocabularies")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--cpm-megabytes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(options.workers)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        english = repeated(sorted(options.corpora.glob("en/*.txt")), folder / "en.txt", int(options.megabytes * 1e6))
        chinese = repeated(
            sorted(options.corpora.glob("zh/*.txt")), folder / "zh.txt", int(options.cpm_megabytes * 1e6)
        )
        cpm = options.configs / "cpm1" / "cpm1-large" / "vocab.txt"
        for title, text, path in (
            ("BPE", english, options.configs / "gpt2" / "gpt2-base"),
            ("WordPiece", english, options.configs / "bert" / "bert-base-uncased"),
            ("CPM-1", chinese, cpm),
        ):
            encoder = (CPM1Encoder if path == cpm else CausalLMEncoder)(str(path))
            if path == cpm:
                name, peer = "the original's way", partial(original_way, text, folder / "peer", cpm, options.workers)
            else:
                lines = [line for line in text.read_text().split("\n") if line.strip()]
                name, peer = "the library alone", partial(library_alone, lines, path)
            for _ in range(options.turns):
                mine = rate(text, partial(our_way, text, folder / "out", encoder, options.workers))
                theirs = rate(text, peer)
                tokens = len(MMapIndexedDataset(folder / "out_1").tokens)
                size = text.stat().st_size / 1e6
                print(
                    f"{title}, {size:.0f} MB, {tokens:,} tokens: {mine:.2f} MB/s, {name} {theirs:.2f} MB/s", flush=True
                )


if __name__ == "__main__":
    main()
