import math
import os
import random
import subprocess
import sys

import pytest

from model_center.tokenizer.unigram import train_unigram

TRAIN = """
import sys
from model_center.tokenizer.unigram import train_unigram
for piece, score in train_unigram(sys.stdin.read().splitlines(), 200, ["<extra_id_0>"]):
    print(piece, score.hex())
"""


def tied_text(number: int) -> list[str]:
    """Lines of random words, nearly all of which occur once, so that most pieces are equally frequent."""
    draw = random.Random(number)
    words = ["".join(draw.choices("abcdeé中", k=draw.randint(1, 7))) for _ in range(3000)]
    return [" ".join(words[start : start + 10]) for start in range(0, len(words), 10)]


@pytest.mark.parametrize("number", [1, 2])
def test_the_same_text_gives_the_same_pieces_and_scores(number: int) -> None:
    lines = tied_text(number)
    trained = {
        subprocess.run(
            [sys.executable, "-c", TRAIN],
            input="\n".join(text),
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
            check=True,
            capture_output=True,
            encoding="utf-8",
        ).stdout
        for seed, text in (("1", lines), ("2", lines), ("3", lines[::-1]))
    }
    assert len(trained) == 1
    assert len(trained.pop().splitlines()) == 200


def test_special_tokens_characters_and_probabilities() -> None:
    text = tied_text(3)
    pieces = train_unigram(text, 150, ["<extra_id_0>", "<extra_id_1>"])
    names = [piece for piece, _ in pieces]
    assert names[:5] == ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
    assert len(names) == len(set(names)) == 150
    assert set("".join(text)) - {" "} | {"▁"} <= set(names)
    assert sum(math.exp(score) for _, score in pieces[5:]) == pytest.approx(1, abs=0.1)


def test_what_words_share_becomes_pieces_however_the_text_is_cut() -> None:
    stems, endings = ["play", "jump", "walk", "climb", "shout"], ["", "ing", "ed", "er"]
    words = [stem + ending for stem in stems for ending in endings]
    one_by_one = train_unigram(words, 40, [])
    assert {f"▁{stem}" for stem in stems} | {"ing"} <= {piece for piece, _ in one_by_one}
    assert train_unigram([" \n".join(words)], 40, []) == one_by_one


def test_a_paragraph_without_spaces() -> None:
    draw = random.Random(4)
    paragraph = "".join(chr(0x4E00 + min(int(draw.paretovariate(0.8)), 50)) for _ in range(150_000))
    assert len(train_unigram([paragraph], 150, [])) == 150


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("", 100, "holds no words"),
        (" \n\t", 100, "holds no words"),
        ("▁", 100, "sentencepiece could not train a tokenizer on the text"),
        ("abc abc", 7, "`size` must be at least 8, for the text's different characters and 4 special tokens, but is 7"),
    ],
)
def test_texts_that_give_no_vocabulary(text: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_unigram([text], size, ["<extra_id_0>"])
