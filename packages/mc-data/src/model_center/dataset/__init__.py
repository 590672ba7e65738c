"""Data sets: indexed corpora (numpy only), and task data sets and the loader (mc-data[torch])."""

from importlib.metadata import version

__version__ = version("mc-data")
__all__ = ["__version__"]
