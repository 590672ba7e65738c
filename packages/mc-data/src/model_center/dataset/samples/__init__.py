"""A small real data set that comes with the package (source and licence: ``BoolQ/README.md``)."""

from pathlib import Path

__all__ = ["sample_path"]


def sample_path() -> Path:
    """The folder to give to ``DATASET['BoolQ']``: class-balanced BoolQ rows of at most 96 BERT tokens."""
    return Path(__file__).parent
