"""Transformer layers and blocks."""

from importlib.metadata import version

__version__ = version("mc-layers")
__all__ = ["__version__"]
