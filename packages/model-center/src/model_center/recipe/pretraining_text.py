"""From raw text to the tokenizer and the indexed data sets of a pre-training run."""

from collections.abc import Sequence
from pathlib import Path

from model_center.tools import CausalLMEncoder, LocalExecutor, ReadOptions, tokenize_files

from .pretrain_configuration import SAMPLE
from .shipped import sample_path
from .tokenizer_training import train_tokenizer

_TRAIN = "train:"


def text_files(text: str | Sequence[str]) -> list[Path]:
    """Return the files of raw text that are meant, in order.

    Args:
        text: Files or glob patterns, or `sample:shakespeare` for the text that comes with this package.

    Raises:
        ValueError: A name or pattern means no file.
    """
    found: list[Path] = []
    for name in [text] if isinstance(text, str) else text:
        if name.startswith(SAMPLE):
            found.append(sample_path(name.removeprefix(SAMPLE)))
            continue
        pattern = Path(name).expanduser()
        if pattern.is_file():  # even if its name looks like a pattern
            found.append(pattern)
            continue
        # Of a pattern, what lies below the root or the working directory.
        matches = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
        if not matches:
            raise ValueError(f"the raw text {name} is no file, and no pattern that fits one")
        found += matches
    return found


def prepare_tokenizer(name: str, text: Sequence[Path], folder: Path, model_type: str) -> str:
    """Return the directory or identifier of a tokenizer, which is trained first where `name` says so.

    One process calls it, the others wait.

    Args:
        name: A directory or identifier, or `train:SIZE`: a vocabulary of at most so many entries is trained on the
            text, of the kind that the family has.
        text: Files of raw text.
        folder: The trained tokenizer becomes `<folder>/tokenizer`; one that is there is used again if it was trained
            on the same files in the same way.
        model_type: The model's family.

    Raises:
        ValueError: There is no text to train on, or the size or the family is not right for it.
    """
    if not name.startswith(_TRAIN):
        return name
    size = name.removeprefix(_TRAIN)
    if not size.isdecimal():
        raise ValueError(f"a tokenizer to be trained must be named train:SIZE, as in train:4000, but is {name!r}")
    if not text:
        raise ValueError(f"the tokenizer {name!r} needs raw text to be trained on, which data.text names")
    return str(train_tokenizer(text, folder / "tokenizer", model_type, int(size)))


def prepare_datasets(
    text: Sequence[Path], folder: Path, name: str, tokenizer: str, *, max_length: int | None, workers: int = 1
) -> None:
    """Make the indexed data sets `<folder>/<name>_1`, … of raw text, one of each file, with `mc-preprocess`'s library.

    One process calls it, the others wait. A run that was interrupted goes on, and data sets that the same files,
    tokenizer and length gave before are used again.

    Args:
        text: Files as `mc-preprocess` reads them.
        folder: Folder of the data sets.
        name: Common start of their names.
        tokenizer: Directory or identifier of the tokenizer.
        max_length: Documents are cut into pieces of so many tokens, each a sample; None keeps them whole.
        workers: Processes that tokenize.

    Raises:
        ValueError: A file is at fault, or data sets of this name were made in another way.
    """
    encoder = CausalLMEncoder(tokenizer, max_length=max_length)
    executor = LocalExecutor(workers)
    try:
        tokenize_files(text, folder / name, encoder, options=ReadOptions(), executor=executor, reuse=True)
    except ValueError as error:
        raise ValueError(
            f"tokenizing raw text: {error} (a run never replaces data sets of another text, tokenizer or length: give "
            "it another folder with --data.path)"
        ) from error
