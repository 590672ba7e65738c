"""Tokenizers of the model families."""

from importlib.metadata import version

__version__ = version("mc-tokenizers")
__all__ = ["__version__"]
