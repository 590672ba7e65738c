"""The model families."""

from importlib.metadata import version

__version__ = version("mc-models")
__all__ = ["__version__"]
