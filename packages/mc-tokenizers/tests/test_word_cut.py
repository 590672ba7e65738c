"""Words are cut exactly as jieba cuts them."""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jieba
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_center.tokenizer import word_cut

jieba.setLogLevel(logging.WARNING)
jieba.initialize()
WORDS = [word for word, frequency in jieba.dt.FREQ.items() if frequency]
# Words of equal frequency that overlap make paths of equal probability.
RARE = [word for word in WORDS if jieba.dt.FREQ[word] <= 3 and len(word) == 2]
LATIN = [word for word in WORDS if re.search("[ -~]", word)]

pieces = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(RARE),
    st.sampled_from(LATIN),
    st.sampled_from(
        ["\r\n", "\n", " ", "\u3000", "\xa0", "1.5%", "U.S.", "3.14.15", "1-2", "a_b", "C++", "C++11", "c#d"]
    ),
    st.sampled_from(list("，。！?<>+#&._%-")),
    st.text(alphabet=st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=4),
    st.text(alphabet="abcXYZ0123456789", max_size=4),
    st.characters(),
)


def reference(text: str) -> list[str]:
    return list(jieba.cut(text))


@settings(max_examples=600)
@given(st.lists(pieces, max_size=12).map("".join))
def test_cuts_are_those_of_jieba(text: str) -> None:
    assert word_cut.cut(text) == reference(text)


@settings(max_examples=300)
@given(st.lists(st.sampled_from(RARE), min_size=2, max_size=30).map("".join))
def test_equally_probable_cuts_are_decided_as_jieba_decides_them(text: str) -> None:
    assert word_cut.cut(text) == reference(text)


@settings(max_examples=100)
@given(st.text())
def test_the_words_are_the_text_again(text: str) -> None:
    assert "".join(word_cut.cut(text)) == text


@pytest.mark.parametrize("name", ["corpora/zh/fortunes_zh.txt", "corpora/zh/quan_tang_shi_0-6k.txt", "LCQMC/dev.tsv"])
def test_cuts_of_every_line_of_a_corpus(shared_dir: Path, name: str) -> None:
    lines = (shared_dir / "data" / name).read_text(encoding="utf-8").splitlines(keepends=True)
    different = [line for line in lines if word_cut.cut(line) != reference(line)]
    assert different == []


def test_cuts_of_english(shared_dir: Path) -> None:
    text = (shared_dir / "data/corpora/en/wikitext2_valid.txt").read_text(encoding="utf-8")[:200_000]
    assert word_cut.cut(text) == reference(text)


@pytest.fixture
def without_rjieba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "rjieba", None)
    word_cut._dictionary.cache_clear()
    yield
    word_cut._dictionary.cache_clear()


@pytest.mark.usefixtures("without_rjieba")
def test_where_rjieba_is_missing_jieba_cuts() -> None:
    assert word_cut._dictionary() == jieba.lcut
    text = "清华大学在北京，C++和1-2都不是U.S.的"
    assert word_cut.cut(text) == reference(text)


def test_the_dictionary_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first: Callable[[str], list[str]] = word_cut._dictionary()
    monkeypatch.setitem(sys.modules, "rjieba", None)
    assert word_cut._dictionary() == first
