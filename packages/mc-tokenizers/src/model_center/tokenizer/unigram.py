"""T5's vocabulary of pieces, trained on text."""

import io
from collections import Counter
from collections.abc import Iterable, Sequence

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

# Sums of floating-point numbers follow the threads, whose number is hence the same on every machine.
_THREADS = 8
# Characters. Chinese has paragraphs without a space, and sentencepiece can train on no line of some 100,000.
_LONGEST_WORD = 1000


def train_unigram(texts: Iterable[str], size: int, sentinels: Sequence[str]) -> list[tuple[str, float]]:
    """Train the pieces of a unigram tokenizer with sentencepiece, as T5's were.

    The same texts give the same pieces and scores to the last bit, in any process and in any order of the texts. (The
    trainer of the tokenizers library is not used because it goes through words in the order of a randomly seeded hash
    map, so that scores, and pieces of nearly equal use, differ from run to run.)

    Args:
        texts: Any text; words are what whitespace separates.
        size: Most pieces; a small text gives fewer.
        sentinels: Special tokens that follow `<pad>`, `</s>` and `<unk>`.

    Returns:
        Each piece with its logarithmic probability (0 for special tokens), in the order of the ids.

    Raises:
        ValueError: There is no word that sentencepiece accepts, or `size` has no room for each character of the text.
    """
    words = Counter(
        word[start : start + _LONGEST_WORD]
        for text in texts
        for word in text.split()
        for start in range(0, len(word), _LONGEST_WORD)
    )
    if not words:
        raise ValueError("the text to train a tokenizer on holds no words")
    needed = 3 + len(sentinels) + len({"▁"}.union(*words))
    if size < needed:
        raise ValueError(
            f"`size` must be at least {needed}, for the text's different characters and {3 + len(sentinels)} special "
            f"tokens, but is {size}"
        )
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=(f"{word}\t{count}" for word, count in sorted(words.items())),
            input_format="tsv",
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            max_sentence_length=4 * _LONGEST_WORD + 32,  # bytes, with the count
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            control_symbols=list(sentinels),
            num_threads=_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"sentencepiece could not train a tokenizer on the text: {error}") from error
    pieces = SentencePieceProcessor(model_proto=model.getvalue())
    return [(pieces.id_to_piece(index), pieces.get_score(index)) for index in range(len(pieces))]
