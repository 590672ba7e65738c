import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from model_center.recipe.shipped import sample_path
from model_center.recipe.tokenizer_training import train_tokenizer
from model_center.tokenizer import load_tokenizer

TRAIN = """
import sys
from pathlib import Path
from model_center.recipe.tokenizer_training import train_tokenizer
text, folder, size, *families = sys.argv[1:]
for family in families:
    train_tokenizer([Path(text)], Path(folder) / family, family, int(size))
"""
FAMILIES = ("gpt2", "bert", "t5")


def test_the_same_text_gives_the_same_files(tmp_path: Path) -> None:
    draw = random.Random(5)
    # Short words of few letters, most of which occur once: nearly everything is equally frequent.
    words = ["".join(draw.choices("abcdefghéß中字", k=draw.randint(1, 6))) for _ in range(1000)]
    text = tmp_path / "text.txt"
    text.write_text("".join(" ".join(words[start : start + 5]) + "\n" for start in range(0, len(words), 5)))
    runs = []
    for number in "12":
        subprocess.run(
            [sys.executable, "-c", TRAIN, str(text), str(tmp_path / number), "320", *FAMILIES],
            env={**os.environ, "PYTHONHASHSEED": number, "RAYON_NUM_THREADS": number},
            check=True,
        )
        files = sorted((tmp_path / number).rglob("*.*"))
        runs.append({str(path.relative_to(tmp_path / number)): path.read_bytes() for path in files})
    assert {name.split("/")[0] for name in runs[0]} == set(FAMILIES)
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("family", "most"),
    # Tokens per character with the trainers of the tokenizers library as they are, measured at this size.
    [("gpt2", 0.3495), ("bert", 0.2893), ("t5", 0.3552)],
)
def test_vocabularies_are_as_good_as_the_library_s(family: str, most: float, tmp_path: Path) -> None:
    sample = sample_path("shakespeare")
    tokenizer = load_tokenizer(str(train_tokenizer([sample], tmp_path / family, family, 2000)))
    with gzip.open(sample, "rt", encoding="utf-8") as file:
        passages = [json.loads(line)["text"] for line in file]
    encoded = [tokenizer.encode(passage) for passage in passages]
    assert sum(map(len, encoded)) <= (most + 0.0005) * sum(map(len, passages))
