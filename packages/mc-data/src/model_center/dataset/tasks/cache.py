"""Tokenized rows on disk, under a name that says everything they depend on.

A file is a checksum followed by an archive of arrays (NumPy's ``.npz``).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal

import numpy as np

from .columns import Column, Ragged
from .encoding import describe, is_fast

FORMAT = 1
CHECKSUM_SIZE = 16
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """What a data set keeps of a split.

    Attributes:
        columns: The model input.
        answers: The accepted answers of each row.
        groups: What each row is scored together with.
    """

    columns: dict[str, Column]
    answers: list[list[str]]
    groups: list[str]


def cache_folder() -> Path:
    """The folder of cached data sets: ``$MODEL_CENTER_CACHE``, or the platform's place for caches."""
    import platformdirs

    folder = os.environ.get("MODEL_CENTER_CACHE")
    return Path(folder) if folder else platformdirs.user_cache_path("model_center", appauthor=False) / "datasets"


def cached(cache: str | Path | Literal[True], identity: object, tokenizer: Any, build: Callable[[], Stored]) -> Stored:
    """Load what was built before, or build and store it.

    A file that is damaged, or that cannot be written, costs only the time to build.

    Args:
        cache: The folder of the files; True for the user's.
        identity: Everything the result depends on beside the tokenizer; its `repr` must say it all.
        tokenizer: The tokenizer.
        build: Makes the result.
    """
    folder = cache_folder() if cache is True else Path(cache)
    key = repr((FORMAT, version("mc-data"), identity, fingerprint(tokenizer)))
    file = folder / f"{hashlib.blake2b(key.encode(), digest_size=20).hexdigest()}.rows"
    if file.exists():
        try:
            return _load(file)
        except (OSError, ValueError) as error:
            logger.warning("%s is made anew: %s", file, error)
    stored = build()
    try:
        _save(file, stored)
    except OSError as error:
        logger.warning("tokenized rows could not be cached in %s: %s", folder, error)
    return stored


def fingerprint(tokenizer: Any) -> str:
    """A hash of what decides a tokenizer's ids.

    Raises:
        ValueError: It offers none.
    """
    own = getattr(tokenizer, "fingerprint", None)
    if isinstance(own, str):
        return own
    if is_fast(tokenizer):
        # What precedes the added tokens is the truncation and padding of the last call.
        _, _, content = tokenizer.backend_tokenizer.to_str().partition('"added_tokens":')
        return hashlib.blake2b(content.encode(), digest_size=20).hexdigest()
    raise ValueError(f"`cache` needs to know which ids a tokenizer gives: {describe(tokenizer)} has no `fingerprint`")


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM_SIZE).digest()


def _save(file: Path, stored: Stored) -> None:
    arrays: dict[str, Any] = {}
    for name, column in stored.columns.items():
        if isinstance(column, Ragged):
            arrays |= {f"values/{name}": column.values, f"bounds/{name}": column.bounds}
        else:
            arrays[f"single/{name}"] = column
    texts = json.dumps({"answers": stored.answers, "groups": stored.groups})
    arrays["texts"] = np.frombuffer(texts.encode(), dtype=np.uint8)
    archive = io.BytesIO()
    np.savez(archive, **arrays)
    content = archive.getvalue()
    file.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=file.parent, prefix=f".{file.stem}.", delete=False) as temporary:
        try:
            temporary.write(_checksum(content) + content)
            temporary.close()
            Path(temporary.name).replace(file)
        except BaseException:
            Path(temporary.name).unlink(missing_ok=True)
            raise


def _load(file: Path) -> Stored:
    everything = file.read_bytes()
    checksum, content = everything[:CHECKSUM_SIZE], everything[CHECKSUM_SIZE:]
    if checksum != _checksum(content):
        raise ValueError("it is damaged")
    columns: dict[str, Column] = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        for entry in arrays.files:
            kind, _, name = entry.partition("/")
            if kind == "values":
                columns[name] = Ragged(arrays[entry], arrays[f"bounds/{name}"])
            elif kind == "single":
                columns[name] = arrays[entry]
        texts = json.loads(arrays["texts"].tobytes())
    return Stored(columns, texts["answers"], texts["groups"])
