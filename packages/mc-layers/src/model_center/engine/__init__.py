"""The engine seam: everything distributed goes through here, under BMTrain's names."""

from importlib.metadata import version

__version__ = version("mc-layers")
__all__ = ["__version__"]
