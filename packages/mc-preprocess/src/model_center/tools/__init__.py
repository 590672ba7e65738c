"""Tools that turn raw text into training data."""

from importlib.metadata import version

__version__ = version("mc-preprocess")
__all__ = ["__version__"]
